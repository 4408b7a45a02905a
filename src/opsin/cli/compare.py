"""`opsin compare DATA --models a,b,c`: the main job."""

from pathlib import Path
from typing import Annotated, Any

import typer


def command(
    data: Annotated[str, typer.Argument(help="A data set's name, folder or file.")],
    models: Annotated[str, typer.Option(help='Names or specs: "convnext_tiny,metanet_xt(mixer=*)".')],
    task: Annotated[str | None, typer.Option(help="classify, segment, detect, restore; by default the data's.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe for every trial; may be repeated.")] = None,
    budget: Annotated[str | None, typer.Option(help="Training time of each trial (3m unless --epochs).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, instead of a budget.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds, the same for every model.", min=1)] = 3,
    size: Annotated[int | None, typer.Option(help="Scale and centre-crop images to this side.")] = None,
    crop: Annotated[int | None, typer.Option(help="Side of random training crops (segment, restore).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many images of each split.")] = None,
    degrade: Annotated[str | None, typer.Option(help="Make restoration data of clean images, e.g. bicubic:2.")] = None,
    jobs: Annotated[int, typer.Option(help="Trials at a time (with --cluster: on each machine).", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="The folder; by default one below runs/.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Send the trials to Ray.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start anew in a folder that holds a comparison.")] = False,
) -> None:
    """Compare models on your data: same budget, paired seeds, costs, a report, and the winner as ONNX.

    The whole takes about models x seeds x budget / jobs. The same command goes on where it stopped.
    """
    from rich.console import Console
    from rich.markup import escape

    from opsin.train.names import check_models

    check_models(models)  # before the slow imports
    from opsin.train.compare import compare

    options = {"size": size, "crop": crop, "limit": limit, "degrade": degrade}
    comparison = compare(
        data, models, task=task, recipe=recipe or (), budget=budget, epochs=epochs, seeds=seeds, jobs=jobs, out=out,
        cluster=cluster, force=force, data_options={k: v for k, v in options.items() if v is not None},
    )  # fmt: skip
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(_table(comparison))
    console.print(f"[bold]report[/]  {escape(str(comparison.report))}", soft_wrap=True)
    winner = comparison.folder / "winner.onnx"
    if winner.is_file():
        console.print(f"[bold]winner[/]  {escape(str(winner))}", soft_wrap=True)


def _certainty(row: Any) -> str:
    if not row.tied:
        return ""
    return " (within the error)" if row.behind.seeds > 1 else " (one seed)"


def _table(comparison: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from opsin.tasks.registry import task_by_name
    from opsin.train.plots import with_spread
    from opsin.train.report import mebibytes, milliseconds, points, si

    score = task_by_name(comparison.settings.task).score
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold", min_width=16)
    for heading in (f"val {score}", "test", "behind best", "params", "MACs", "latency", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)

    for row in comparison.ranking:
        behind = "" if row.behind is None else points(row.behind.mean, score) + _certainty(row)
        table.add_row(
            escape(row.model), "failed" if row.val is None else with_spread(row.val, row.val_sd, score),
            "" if row.test is None else with_spread(row.test, row.test_sd, score), behind,
            si(row.params), si(row.macs), milliseconds(row.latency_ms), mebibytes(row.memory),
        )  # fmt: skip
    return table
