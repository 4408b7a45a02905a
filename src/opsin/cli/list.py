"""`opsin list`: what the catalogue holds."""

import json
from typing import Annotated

import typer

from opsin.catalog import list_cards, verdict_of


def command(
    kind: Annotated[str | None, typer.Option(help="Only systems of this kind, e.g. backbone.")] = None,
    search: Annotated[str | None, typer.Option(help="Only systems in whose card every word occurs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the systems."""
    cards = list_cards(kind, search)
    if as_json:
        rows = [
            {"key": c.key, "kind": c.kind, "year": c.year, "arxiv": c.arxiv, "summary": c.summary,
             "variants": list(c.variants), "verdict": (verdict_of(c) or {}).get("verdict")}
            for c in cards
        ]  # fmt: skip
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True, caption=f"{len(cards)} systems", caption_justify="left")
    for heading in ("name", "kind", "claim"):
        table.add_column(heading, no_wrap=True)
    table.add_column("what it is", no_wrap=True, overflow="ellipsis", ratio=1)
    for c in cards:
        verdict = (verdict_of(c) or {}).get("verdict", "")
        table.add_row(c.key, c.kind, verdict, c.summary)
    Console().print(table)
