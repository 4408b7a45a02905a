"""`opsin generate NAME`: images from noise, as one PNG."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="A generator's name or spec, or a .safetensors file, e.g. edm_digits.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")],
    n: Annotated[int, typer.Option("-n", help="How many images.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.", min=2)] = 18,
    seed: Annotated[int, typer.Option(help="The same seed draws the same images.", min=0)] = 0,
    sampler: Annotated[str, typer.Option(help="heun, euler, dpm2m or unipc.")] = "heun",
    trick: Annotated[str | None, typer.Option(help='e.g. "skip_tuning(rho_bottom=0.7)".')] = None,
    label: Annotated[int | None, typer.Option(help="A class for all images.")] = None,
    weights: Annotated[Path | None, typer.Option(help="A weights file for the named model.")] = None,
    zoom: Annotated[int | None, typer.Option(help="Pixels of the PNG per pixel of an image.", min=1)] = None,
    force: Annotated[bool, typer.Option(help="Replace the PNG that is there.")] = False,
) -> None:
    """Draw images from a diffusion model into a grid."""
    from rich.progress import Progress

    from opsin.generate.verb import generate

    with Progress(transient=True) as progress:
        task = progress.add_task("drawing", total=n)
        generate(
            model, n, steps=steps, seed=seed, sampler=sampler, trick=trick, label=label, weights=weights, zoom=zoom,
            output=output, force=force, on_batch=lambda count: progress.advance(task, count),
        )  # fmt: skip
    print(f"{n} images in {output}")
