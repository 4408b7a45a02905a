"""`opsin app`: the web page."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="An exported file, a run, or a folder of these; by default runs/. May be repeated."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="The port; by default the first free one from 7860.")] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Serve a small web page: the catalogue, labels for an image, a larger photo."""
    import opsin

    opsin.app(model or (), host=host, port=port, browser=browser)
