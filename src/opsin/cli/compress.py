"""`opsin compress MODEL`: a smaller model within a budget."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of a run, or a name of the catalogue.")],
    data: Annotated[str | None, typer.Argument(help="A data set, for the accuracy before and after.")] = None,
    method: Annotated[str, typer.Option(help="A compressor; `opsin list --kind compressor`.")] = "zeroq",
    bits: Annotated[float | None, typer.Option(help="Average bits per weight at most.")] = None,
    size: Annotated[int | None, typer.Option("--bytes", help="Bytes of stored weights at most.")] = None,
    params: Annotated[int | None, typer.Option(help="Parameters at most.")] = None,
    macs: Annotated[int | None, typer.Option(help="Multiply-accumulates per image at most.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="name=value for the compressor; repeatable.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="A .pt2 or .onnx file to write.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")] = False,
) -> None:
    """Compress a model and report what was measured before and after."""
    from opsin.cli.options import parse_options
    from opsin.compress import Budget
    from opsin.verbs.compress import compress

    budget = Budget(params=params, macs=macs, bytes=size, bits=bits)
    report = compress(
        model, data, method=method, budget=budget, output=output, force=force, **parse_options(option)
    ).report
    for name, before in report.before.items():
        print(f"{name:12} {before:>14,.6g} -> {report.after[name]:,.6g}")
    if report.score_before is not None and report.score_after is not None:
        print(f"{'accuracy':12} {100 * report.score_before:>13.2f}% -> {100 * report.score_after:.2f}%")
    if output:
        print(f"written: {output}")
