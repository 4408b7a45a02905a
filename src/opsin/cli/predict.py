"""`opsin predict IMAGES --model FILE`: label images with an exported file or a run."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images.")],
    model: Annotated[Path, typer.Option(help="An .onnx or .pt2 file written by `opsin export`, or a run's folder.")],
    top: Annotated[int, typer.Option(help="How many classes to keep for each image.")] = 3,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write a .csv or .json file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Annotated[bool, typer.Option(help="Replace the output file that is there.")] = False,
) -> None:
    """Label images: class and probability of each."""
    from rich.console import Console
    from rich.markup import escape

    from opsin.deploy.predict import check_output, predict

    if output:
        check_output(output, force)
    found = predict(images, model, top=top, progress=True)
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    elif output is None:
        Console().print(_table(found))
    if output:
        Console().print(f"{len(found)} images labelled, written to {escape(str(output))}", highlight=False)
        found.save(output, force=force)
    notes = Console(stderr=True, highlight=False)
    for _, reason in found.skipped:
        notes.print(f"skipped: {escape(reason)}", soft_wrap=True)
    if found.skipped:
        notes.print(f"{len(found.skipped)} of {len(found) + len(found.skipped)} files could not be read")


def _table(found: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("label")
    table.add_column("probability", justify="right")
    table.add_column("then")
    for row in found:
        then = ", ".join(f"{label} {p:.3f}" for label, p in row.top[1:])
        table.add_row(escape(row.file), escape(row.label), f"{row.probability:.3f}", escape(then))
    return table
