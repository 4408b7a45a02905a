"""What exists: cards, search and `create()`.

Reading the catalogue imports no torch; creating a system imports its own file and nothing else.
"""

from opsin.catalog.cards import Card, Variant, all_cards, card_of, find, list_cards, operators, show, verdict_of
from opsin.catalog.create import create, entry, expand, parse_spec

__all__ = [
    "Card", "Variant", "all_cards", "card_of", "create", "entry", "expand", "find", "list_cards", "operators",
    "parse_spec", "show", "verdict_of",
]  # fmt: skip
