"""The contract of the room `backbones`, over every card, and over members that are broken on purpose."""

import backbone_checks as checks
import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones import Backbone, FeatureInfo
from opsin.catalog import all_cards
from opsin.catalog.cards import Card

CARDS = [card for card in all_cards().values() if card.kind == "backbone"]


def small(card: Card) -> tuple[str, int]:
    """A quick member and its image size: the card's fact `small` (a spec), or its smallest variant on few pixels."""
    if "small" in card.facts:
        return card.facts["small"], card.facts.get("small_input", 32)
    sized = [v for v in card.variants.values() if v.params_m]
    variant = min(sized, key=lambda v: v.params_m or 0.0)
    return variant.name, 64 if card.facts.get("any_input_size") else variant.input or 224


def builder(card: Card) -> tuple[checks.Build, int]:
    spec, size = small(card)
    return lambda **overrides: opsin.create(spec, **overrides), size


@pytest.mark.parametrize("check", checks.ALWAYS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.key)
def test_contract(card, check):
    check(*builder(card))


@pytest.mark.parametrize("card", [c for c in CARDS if c.facts.get("any_input_size")], ids=lambda c: c.key)
def test_odd_sizes(card):
    checks.odd_sizes(*builder(card))


class Good(Backbone):
    """The smallest member: two convolutions, a norm, and a classifier."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8
        self.feature_info = [FeatureInfo(6, 2), FeatureInfo(8, 4)]
        self.first = nn.Conv2d(in_chans, 6, 3, 2, 1)
        self.bn = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 8, 3, 2, 1)
        self.fc = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def features(self, x: Tensor) -> list[Tensor]:
        x = self.bn(self.first(x)).relu()
        return [x, self.second(x)]

    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.relu().mean((2, 3)))


class WrongStride(Good):
    def features(self, x: Tensor) -> list[Tensor]:
        return [*super().features(x)[:1], self.second(self.bn(self.first(x)).relu())[:, :, ::2, ::2]]


class PoolsNothing(Good):
    def forward_head(self, x: Tensor) -> Tensor:
        return self.fc(x.relu().mean((2, 3))) if self.num_classes else x


class AlwaysColour(Good):
    def __init__(self, num_classes: int = 10, in_chans: int = 3):
        super().__init__(num_classes, 3)


class OnlyEvenSides(Good):
    def features(self, x: Tensor) -> list[Tensor]:
        n, c, h, w = x.shape
        return super().features(x.view(n, c, h // 2, 2, w // 2, 2).flatten(4).flatten(2, 3))


class LooksAtNeighbours(Good):
    def features(self, x: Tensor) -> list[Tensor]:
        return super().features(x - x.mean(0, keepdim=True))


class DeadWeight(Good):
    def __init__(self, **options: int):
        super().__init__(**options)
        self.unused = nn.Parameter(torch.zeros(3))


class OnlyFloat32(Good):
    def forward_head(self, x: Tensor) -> Tensor:
        return super().forward_head(x + torch.zeros(1, dtype=torch.float32))


class BranchesOnValues(Good):
    def forward_head(self, x: Tensor) -> Tensor:
        return super().forward_head(x if float(x.sum()) > 0 else -x)


class HiddenState(Good):
    def __init__(self, **options: int):
        super().__init__(**options)
        self.register_buffer("hidden", torch.rand(8, 1, 1), persistent=False)

    def features(self, x: Tensor) -> list[Tensor]:
        first, second = super().features(x)
        return [first, second * self.hidden]


class StartsFrozen(Good):
    def __init__(self, **options: int):
        super().__init__(**options)
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
            parameter.data.mul_(1e-3)


BROKEN = [
    (checks.pyramid, WrongStride), (checks.head, PoolsNothing), (checks.channels, AlwaysColour),
    (checks.odd_sizes, OnlyEvenSides), (checks.independent_samples, LooksAtNeighbours), (checks.gradients, DeadWeight),
    (checks.bfloat16, OnlyFloat32), (checks.exports, BranchesOnValues), (checks.round_trip, HiddenState),
    (checks.initialised, StartsFrozen),
]  # fmt: skip


@pytest.mark.parametrize("check", [*checks.ALWAYS, checks.odd_sizes], ids=lambda c: c.__name__)
def test_checks_pass_a_good_member(check):
    check(Good, 32)


@pytest.mark.parametrize(("check", "member"), BROKEN, ids=lambda p: p.__name__)
def test_checks_catch_a_broken_member(check, member):
    with pytest.raises((AssertionError, RuntimeError, torch._dynamo.exc.UserError)):
        check(member, 32)


def test_every_check_has_a_broken_member():
    assert {check for check, _ in BROKEN} == {*checks.ALWAYS, checks.odd_sizes}
