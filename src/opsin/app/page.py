"""A small web page on this machine: look things up, label an image, enlarge a photo."""

from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opsin.app import actions
from opsin.errors import MissingExtra, OpsinError

RUNS = Path("runs")


def launch(
    models: Sequence[str | Path] = (), *, host: str = "127.0.0.1", port: int | None = None, browser: bool = True
) -> None:
    """Serves the page until it is interrupted.

    models: exported files, runs, or folders that hold them; by default what lies below runs/.
    host: only this machine can open the page, unless this is "0.0.0.0".
    Raises MissingExtra (gradio), BadInput (models).
    """
    page = build(models)
    page.launch(server_name=host, server_port=port, inbrowser=browser, quiet=False)


def build(models: Sequence[str | Path] = ()) -> Any:
    """The page, not yet served. Raises MissingExtra, BadInput."""
    if find_spec("gradio") is None:
        raise MissingExtra("gradio", "app")
    import gradio as gr

    found = actions.find_models(models or [RUNS] * RUNS.is_dir())
    with gr.Blocks(title="Opsin", analytics_enabled=False) as page:
        gr.Markdown("# Opsin\nComputer vision's ideas as interchangeable, measured parts.")
        with gr.Tab("Catalogue"):
            _catalogue(gr)
        with gr.Tab("Label an image"):
            _classify(gr, found)
        with gr.Tab("Enlarge a photo"):
            _restore(gr)
    return page


def _told(gr: Any, action: Callable[..., Any]) -> Callable[..., Any]:
    """The action, with the user's errors shown as sentences on the page."""

    @wraps(action)
    def run(*arguments: Any) -> Any:
        try:
            return action(*arguments)
        except OpsinError as error:
            raise gr.Error(str(error)) from error

    return run


def _catalogue(gr: Any) -> None:
    with gr.Row():
        kind = gr.Dropdown(actions.kinds(), value="all", label="kind")
        search = gr.Textbox(label="search", placeholder="words that the card holds")
    table = gr.Dataframe(
        actions.catalogue(), headers=list(actions.HEADINGS), interactive=False, wrap=True,
        column_widths=["18%", "12%", "8%", "12%", "50%"],
    )  # fmt: skip
    about = gr.Markdown()
    for field in (kind, search):
        field.change(actions.catalogue, [kind, search], table)

    def chosen(rows: Any, event: gr.SelectData) -> str:
        return actions.describe(event.row_value[0])

    table.select(chosen, table, about)


def _classify(gr: Any, found: list[str]) -> None:
    with gr.Row():
        image = gr.Image(type="filepath", label="image")
        labels = gr.Label(num_top_classes=5, label="classes")
    model = gr.Dropdown(found, value=found[0] if found else None, label="model")
    gr.Button("Label", variant="primary").click(_told(gr, actions.classify), [image, model], labels)


def _restore(gr: Any) -> None:
    with gr.Row():
        before = gr.Image(type="filepath", label="photo")
        after = gr.Image(type="filepath", label="enlarged", interactive=False)
    scale = gr.Radio([2, 3, 4], value=2, label="times")
    gr.Button("Enlarge", variant="primary").click(_told(gr, actions.restore_photo), [before, scale], after)
