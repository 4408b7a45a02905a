"""`opsin export RUN_OR_NAME -o FILE`: one file that runs without Opsin."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of a run, or a name of the catalogue.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write: .onnx or .pt2.")],
    weights: Annotated[str | None, typer.Option(help="For a name: shipped, hub, or a weights file.")] = None,
    input: Annotated[int | None, typer.Option(help="Side of the input in pixels; known for a run.")] = None,
    channels: Annotated[int | None, typer.Option(help="Channels of the input; known for a run.")] = None,
    format: Annotated[str | None, typer.Option(help="onnx or torch; by default what the suffix says.")] = None,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Freeze the batch size to 2.")] = False,
    check: Annotated[bool, typer.Option(help="Compare the file with PyTorch.")] = True,
    force: Annotated[bool, typer.Option(help="Replace the file that is there.")] = False,
) -> None:
    """Export a model to ONNX or a PyTorch program, and check it against PyTorch."""
    from opsin.deploy.export import write
    from opsin.deploy.source import open_model

    network, facts = open_model(model, weights=weights)
    exported = write(
        network, output, facts=facts, input_size=input, channels=channels, format=format,  # type: ignore[arg-type]
        dynamic_batch=not fixed_batch, check=check, force=force,
    )  # fmt: skip
    agrees = "not checked" if exported.difference is None else f"within {exported.difference:.1e} of PyTorch"
    print(f"{exported.path}: {exported.format}, {exported.bytes / 1e6:.1f} MB, {agrees}")
