"""`opsin explain IMAGE --model RUN`: a picture of why."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    model: Annotated[str, typer.Option(help="The folder of a run, or a name of the catalogue.")],
    method: Annotated[str, typer.Option(help="An explainer; `opsin list --kind explainer`.")] = "salient_relevance",
    target: Annotated[int | None, typer.Option(help="Class index; the predicted class by default.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")] = Path("explanation.png"),
    force: Annotated[bool, typer.Option(help="Replace the output if it exists.")] = False,
) -> None:
    """Explain a model's answer on one image."""
    from opsin.verbs.explain import explain

    explanation = explain(image, model, method=method, target=target, output=output, force=force)
    print(f"class {explanation.target}, {method}: {output}")
