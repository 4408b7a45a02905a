"""`opsin claim NAME`: rerun the experiment behind a system's claim."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(help="A system's key.")],
    budget: Annotated[str, typer.Option(help="Time to spend, e.g. 90s, 5m.")] = "5m",
    seeds: Annotated[int, typer.Option(help="Seeds where training is involved.", min=1)] = 3,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Where to write the evidence.")] = None,
    force: Annotated[bool, typer.Option(help="Replace the evidence that is there.")] = False,
) -> None:
    """Run a system's claim and write its evidence."""
    from opsin.measure.evidence import claim

    evidence = claim(name, budget=budget, seeds=seeds, output=output, force=force)
    for c in evidence.criteria:
        answer = {True: "yes", False: "no", None: "undecided"}[c.held]
        print(f"{c.name}: {c.value:.4g} {c.relation} {c.threshold:g}: {answer}")
    print(f"{evidence.key}: {evidence.verdict} ({evidence.seconds:.0f} s)")
