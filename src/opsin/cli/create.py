"""`opsin create NAME`: build a system and say what it is, or write its structure."""

from typing import Annotated

import typer


def command(
    name: Annotated[str, typer.Argument(help='A name or spec, e.g. "metanet_t(mixer=tvconv)".')],
    weights: Annotated[str | None, typer.Option(help="shipped, hub, or a weights file.")] = None,
) -> None:
    """Build a system and print its structure."""
    from opsin.catalog import create

    print(create(name, weights=weights))
