"""`opsin adapt METHOD MODEL DATA`: a small difference that makes a frozen network fit new data."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    method: Annotated[str, typer.Argument(help="An adapter; `opsin list --kind adapter`.")],
    model: Annotated[str, typer.Argument(help="The folder of a run, or a name of the catalogue.")],
    data: Annotated[str, typer.Argument(help="A data set: a name or a path.")],
    option: Annotated[list[str] | None, typer.Option(help="name=value for the adapter; repeatable.")] = None,
    budget: Annotated[str | None, typer.Option(help="Time to train, e.g. 5m.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, instead of a budget.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="The run's folder.")] = Path("runs/adapted"),
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is there.")] = False,
) -> None:
    """Adapt a network to new data."""
    from opsin.cli.options import parse_options
    from opsin.verbs.adapt import adapt

    result = adapt(
        method, model, data, budget=budget, epochs=epochs, lr=lr, seed=seed, out=out, force=force,
        **parse_options(option),
    )  # fmt: skip
    trained = sum(p.numel() for p in result.model.parameters() if p.requires_grad)
    print(f"{result.run.result['score_name']}: {result.run.val_score:.4g}, {trained:,} trained parameters")
    if result.file:
        print(f"adapter: {result.file} ({result.file.stat().st_size:,} bytes)")
