"""`opsin pretrain METHOD DATA --backbone NAME`: train a backbone without labels."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    method: Annotated[str, typer.Argument(help="A pre-trainer; `opsin list --kind pretrainer`.")],
    data: Annotated[str, typer.Argument(help="A data set: a name or a path; labels are not used.")],
    backbone: Annotated[str, typer.Option(help="A backbone's name or spec.")],
    option: Annotated[list[str] | None, typer.Option(help="name=value for the pre-trainer; repeatable.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time to train, e.g. 5m.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, instead of a budget.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The run's folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
) -> None:
    """Pre-train a backbone and keep its weights."""
    from opsin.cli.options import parse_options
    from opsin.verbs.pretrain import BACKBONE, pretrain

    run = pretrain(
        method, backbone, data, budget=budget, epochs=epochs, seed=seed, out=out, force=force,
        **parse_options(option),
    )  # fmt: skip
    print(f"held-out loss: {-run.val_score:.4g}")
    print(f"backbone: {run.path / BACKBONE}")
