"""`opsin attack MODEL DATA`: fooling rates of perturbed patches."""

from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of a run, or a name of the catalogue.")],
    data: Annotated[str, typer.Argument(help="A data set: a name or a path.")],
    method: Annotated[str, typer.Option(help="An attack; `opsin list --kind attack`.")] = "vit_patch_robustness",
    patch_size: Annotated[int, typer.Option(help="Side of the patch in pixels.", min=1)] = 16,
    steps: Annotated[int, typer.Option(help="Gradient steps at most.", min=1)] = 100,
    step_size: Annotated[float, typer.Option(help="Of a step, in image units.")] = 2 / 255,
    limit: Annotated[int, typer.Option(help="Correctly classified images to attack.", min=1)] = 20,
    temperature: Annotated[float, typer.Option(help="Above 1: smoothed attention as the defence.")] = 1.0,
    corruption: Annotated[str, typer.Option(help="Of ImageNet-C, for the natural patches.")] = "gaussian_noise",
    severity: Annotated[int, typer.Option(help="Of the corruption, 1 to 5.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the patches' first content.")] = 0,
) -> None:
    """Attack a model with patches at every position."""
    from opsin.verbs.attack import attack

    report = attack(
        model, data, method=method, patch_size=patch_size, steps=steps, step_size=step_size, limit=limit,
        temperature=temperature, corruption=corruption, severity=severity, seed=seed,
    )  # fmt: skip
    print(f"images attacked: {report.images} (accuracy on those looked at: {report.clean_accuracy:.1f} %)")
    print(f"fooled by an adversarial patch: {report.adversarial:.1f} % of positions")
    print(f"fooled by a naturally corrupted patch: {report.natural:.1f} % of positions")
    print("adversarial rate by position, percent:")
    for row in (100 * report.map).round().int().tolist():
        print("  " + " ".join(f"{value:3d}" for value in row))
