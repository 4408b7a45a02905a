"""`opsin show NAME`: everything that is known of one system."""

from typing import Annotated, Any

import typer

from opsin.catalog import show


def command(name: Annotated[str, typer.Argument(help="A system's key or one of its variants.")]) -> None:
    """Show a system: idea, paper, published sizes, claim and verdict, and how to use it."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    facts = show(name)
    card, evidence = facts["card"], facts["evidence"]
    python, shell = facts["usage"]
    console.print(f"[bold]{card.key}[/]  {card.kind}\n{escape(card.summary)}\n")
    if card.paper:
        link = f"  arXiv:{card.arxiv}" if card.arxiv else ""
        console.print(f"[bold]Paper[/]    {escape(card.paper)} ({card.year}){link}")
    if card.headline:
        console.print(f"[bold]Published[/]  {escape(card.headline)}")
    for title, values in (("Options", card.options), ("Facts", card.facts)):
        if values:
            console.print(f"[bold]{title}[/]")
            for key, value in values.items():
                console.print(f"  {key}: {escape(str(value))}")
    if card.variants:
        console.print(_variants(card))
    console.print(f"[bold]Claim[/]    {escape(_verdict(evidence))}")
    console.print(f"\n[bold]Python[/]\n{escape(python)}\n[bold]Command line[/]\n{escape(shell)}", soft_wrap=True)


def _variants(card: Any) -> Any:
    from rich.table import Table

    table = Table(title="Variants, as published", title_justify="left", box=None, pad_edge=False)
    for heading in ("name", "params M", "MACs G", "input", "top-1", "notes"):
        table.add_column(heading, no_wrap=heading == "name")
    for v in card.variants.values():
        more = "; ".join([v.note] * bool(v.note) + [f"{k} {x}" for k, x in v.published.items()])
        cells = (v.params_m, v.macs_g, v.input, v.top1)
        table.add_row(v.name, *("" if cell is None else f"{cell:g}" for cell in cells), more)
    return table


def _verdict(evidence: dict[str, Any] | None) -> str:
    if evidence is None:
        return "not measured yet"
    lines = [f"{evidence['claim']}\n  verdict: {evidence['verdict']} ({evidence['date']}, {evidence['machine']})"]
    for c in evidence["criteria"]:
        answer = {True: "yes", False: "no", None: "undecided"}[c["held"]]
        spread = f" ± {c['standard_error']:.3g}" if c.get("standard_error") is not None else ""
        lines.append(f"  {c['name']}: {c['value']:.4g}{spread} {c['relation']} {c['threshold']:g}: {answer}")
    return "\n".join(lines)
