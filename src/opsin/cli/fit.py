"""`opsin fit MODEL DATA`: train one model on one data set."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help='A name or spec, e.g. "metanet_xt(mixer=tvconv)".')],
    data: Annotated[str, typer.Argument(help="A data set's name, or a folder or file.")],
    task: Annotated[str | None, typer.Option(help="classify, segment, detect, restore; by default the data's.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe; may be given several times.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time for training and validation, e.g. 90s, 5m.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, order and augmentation.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps, e.g. 0.05.")] = None,
    label_smoothing: Annotated[float | None, typer.Option(help="Share of probability over all classes.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Validate and keep averaged weights.")] = False,
    augment: Annotated[bool, typer.Option(help="Augment the training images.")] = True,
    precision: Annotated[str, typer.Option(help="32 or bf16.")] = "32",
    devices: Annotated[int, typer.Option(help="GPUs, or processes where there is none.")] = 1,
    size: Annotated[int | None, typer.Option(help="Scale and centre-crop images to this side.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of random training crops (segment, restore).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images of each split.")] = None,
    degrade: Annotated[str | None, typer.Option(help="Make restoration data of clean images, e.g. bicubic:2.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Start anew in a folder that holds another run.")] = False,
) -> None:
    """Train a model; the same command goes on where it was interrupted."""
    from opsin.train.fit import fit

    options = {"size": size, "crop": crop, "limit": limit, "degrade": degrade}
    run = fit(
        model, data, task, recipe=recipe or (), epochs=epochs, budget=budget, seed=seed, out=out,
        batch_size=batch_size, lr=lr, weight_decay=weight_decay, warmup=warmup, label_smoothing=label_smoothing,
        ema=ema, augment=augment, precision=precision, devices=devices, force=force,
        data_options={name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    result = run.result
    test = "" if run.test_score is None else f", test {run.test_score:.4g}"
    print(f"{result['score_name']}: validation {run.val_score:.4g} (step {result['best_step']}){test}")
    print(f"{result['params'] / 1e6:.2f} M parameters, {result['steps']} steps in {result['seconds']:.0f} s")
    if result["message"]:
        print(result["message"])
    print(f"best weights: {run.path / 'weights.safetensors'}\ncurves:       {run.path / 'curves.png'}")
