"""`opsin restore PHOTO_OR_FOLDER -o OUT`: better photos."""

import sys
from pathlib import Path
from typing import Annotated

import typer


def command(
    source: Annotated[Path, typer.Argument(help="A photo, or a folder of photos.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the results, or a file for one photo.")],
    task: Annotated[str, typer.Option(help="What to do; sr enlarges.")] = "sr",
    scale: Annotated[int, typer.Option(help="How many times larger.", min=1)] = 2,
    model: Annotated[str | None, typer.Option(help="A restorer of the catalogue instead of the task's own.")] = None,
    weights: Annotated[str, typer.Option(help="With --model: shipped, hub, or a weights file.")] = "shipped",
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there.")] = False,
    side_by_side: Annotated[bool, typer.Option("--side-by-side", help="Also write a before-and-after.")] = False,
    tile: Annotated[int | None, typer.Option(help="Side of the tiles in pixels; by default from --max-memory.")] = None,
    max_memory: Annotated[str, typer.Option(help="Memory for the network's tensors, e.g. 512M or 2G.")] = "256M",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Restore a photo, or every photo of a folder: enlarge, clean, repair."""
    from opsin.restore.verb import restore

    result = restore(
        source, task=task, scale=scale, model=model, weights=weights, output=output, force=force,
        side_by_side=side_by_side, tile=tile, max_memory=_bytes(max_memory), device=device,
    )  # fmt: skip
    for path in result:
        print(path)
    for path, reason in result.skipped:
        print(f"opsin: skipped {path}: {reason}", file=sys.stderr)
    if result.there or result.skipped:
        done = f"{len(result)} files written, {len(result.there)} were there already, {len(result.skipped)} skipped"
        print(f"opsin: {done}", file=sys.stderr)


def _bytes(text: str) -> int:
    from opsin.errors import BadInput

    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in units else (text, "")
    if not number.isdigit() or int(number) == 0:
        raise BadInput(f"--max-memory {text} is not a size; write for example 512M or 2G")
    return int(number) * units.get(unit, 1)
