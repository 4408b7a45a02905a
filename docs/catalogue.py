"""Writes the catalogue pages from cards, evidence and docstrings, when the documentation is built."""

import ast
from collections import defaultdict
from pathlib import Path
from typing import Any

import mkdocs_gen_files

from opsin.catalog import Card, all_cards, verdict_of
from opsin.catalog.cards import KINDS, PACKAGE, usage

ANSWERS = {True: "yes", False: "no", None: "undecided"}


def source_of(card: Card) -> Path:
    """The file that a card points at; of a package its `__init__`."""
    place = PACKAGE.parent / Path(*card.entry.partition(":")[0].split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def docstring_of(card: Card) -> str:
    return ast.get_docstring(ast.parse(source_of(card).read_text(encoding="utf-8"))) or ""


def cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def table(heads: list[str], rows: list[list[Any]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(cell(v) for v in row) + " |" for row in rows]) + "\n"


def variants(card: Card) -> str:
    rows = [
        [f"`{v.name}`", v.params_m, v.macs_g, v.input, v.top1,
         "; ".join([v.note] * bool(v.note) + [f"{k} {x}" for k, x in v.published.items()])]
        for v in card.variants.values()
    ]  # fmt: skip
    return "## Variants\n\nNumbers as published.\n\n" + table(
        ["name", "parameters (M)", "MACs (G)", "input", "top-1 (%)", "notes"], rows
    )


def evidence(record: dict[str, Any]) -> str:
    rows = [
        [c["name"], c["value"], c.get("standard_error"), f"{c['relation']} {c['threshold']:g}", ANSWERS[c["held"]]]
        for c in record["criteria"]
    ]
    facts = "; ".join(f"{name}: {record[name]}" for name in ("data", "baseline", "budget", "notes") if record[name])
    return (
        f"## Claim: {record['verdict']}\n\n{record['claim']}\n\n"
        + table(["what was measured", "value", "standard error", "wanted", "held"], rows)
        + f"\n{facts}\n\nMeasured {record['date']} on {record['machine']}, {record['seconds']:g} s, "
        f"commit `{record['commit']}`.\n"
    )


def page(card: Card) -> str:
    parts = [f"# {card.key}\n\n*{card.kind}* — {card.summary}\n"]
    if card.paper:
        link = f", [arXiv:{card.arxiv}](https://arxiv.org/abs/{card.arxiv})" if card.arxiv else ""
        parts.append(f"**Paper.** {card.paper} ({card.year}){link}\n")
    if card.headline:
        parts.append(f"**Published.** {card.headline}\n")
    parts.append("## Idea\n\n```text\n" + docstring_of(card) + "\n```\n")
    python, shell = usage(card)
    parts.append(f"## Use\n\n```python\n{python.strip()}\n```\n\n```bash\n{shell}\n```\n")
    for title, values in (("Options", card.options), ("Facts", card.facts)):
        if values:
            parts.append(f"## {title}\n\n" + table(["", ""], [[f"`{k}`", v] for k, v in values.items()]))
    if card.variants:
        parts.append(variants(card))
    record = verdict_of(card)
    parts += [evidence(record)] if record else []
    return "\n".join(parts)


def index(groups: dict[str, list[Card]]) -> str:
    parts = ["# Catalogue\n\nEvery system, by kind. Verdicts are of the claims that were run here.\n"]
    for kind in KINDS:
        if groups[kind]:
            rows = [
                [f"[{c.key}]({c.key}.md)", c.year or "", c.summary, (verdict_of(c) or {}).get("verdict", "")]
                for c in groups[kind]
            ]
            parts.append(f"## {kind}\n\n" + table(["system", "year", "what it is", "claim"], rows))
    return "\n".join(parts)


groups: dict[str, list[Card]] = defaultdict(list)
for card in all_cards().values():
    groups[card.kind].append(card)
    with mkdocs_gen_files.open(f"catalogue/{card.key}.md", "w") as file:
        file.write(page(card))
with mkdocs_gen_files.open("catalogue/index.md", "w") as file:
    file.write(index(groups))
