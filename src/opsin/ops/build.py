"""Operators by name, for the networks that leave one open."""

from typing import Any

from torch import nn

from opsin.catalog import card_of, create


def build_operator(name: str, dim: int, input_size: tuple[int, int], **options: Any) -> nn.Module:
    """An operator by its catalogue name; `input_size`, its output map, goes to those whose weights are bound to one.

    Raises UnknownName, or BadInput where it does not take an option.
    """
    place = {"input_size": input_size} if card_of(name).facts.get("fixed_size") else {}
    return create(name, dim=dim, **place, **options)
