"""Every published size is reproduced: parameters within 0.5 %, MACs within 2 %, or half a unit of the last digit."""

from decimal import Decimal

import pytest

from opsin.catalog import all_cards
from opsin.measure.cost import measure

KINDS = ("backbone", "restorer", "classifier", "segmenter", "detector", "dense", "embedder", "video")
PUBLISHED = [
    variant
    for card in all_cards().values()
    if card.kind in KINDS
    for variant in card.variants.values()
    if variant.input and (variant.params_m or variant.macs_g)
]


def half_unit(number: float) -> float:
    """Half a unit of the last digit that is written: 0.05 for 4.5, 0.5 for 61."""
    return 0.5 * 10.0 ** int(Decimal(repr(number)).as_tuple().exponent)


def agrees(measured: float, published: float | None, relative: float) -> bool:
    """Whether a count agrees with what is printed, where something is printed."""
    return published is None or abs(measured - published) <= max(relative * published, half_unit(published))


def test_the_rule_itself():
    assert agrees(61.4, 61, 0.005) and not agrees(61.6, 61, 0.005)
    assert agrees(28.4, 28.29, 0.005) and not agrees(28.5, 28.29, 0.005)
    assert agrees(4.41, 4.5, 0.02) and not agrees(4.39, 4.5, 0.02)
    assert agrees(1e9, None, 0.02)


@pytest.mark.parametrize("variant", PUBLISHED, ids=lambda v: v.name)
def test_published_size(variant):
    cost = measure(variant.name, variant.input, modes=())
    assert agrees(cost.params / 1e6, variant.params_m, 0.005), f"{cost.params / 1e6} M, published {variant.params_m}"
    assert agrees(cost.macs / 1e9, variant.macs_g, 0.02), f"{cost.macs / 1e9} G, published {variant.macs_g}"
