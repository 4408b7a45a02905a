"""The contract of segmenters, over every card of the kind and the linear one, and over members broken on purpose."""

from functools import partial

import pytest
import segmenter_checks as checks
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

import opsin
from opsin.backbones import Backbone, FeatureInfo
from opsin.catalog import all_cards
from opsin.catalog.cards import Card
from opsin.data import IGNORE
from opsin.tasks import Masks
from opsin.tasks.segment import LinearSegmenter, Segment, Segmenter

CARDS = [card for card in all_cards().values() if card.kind == "segmenter"]


@pytest.mark.parametrize("check", checks.ALWAYS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("card", CARDS, ids=lambda c: c.key)
def test_contract(card: Card, check):
    spec = card.facts.get("small", next(iter(card.variants), card.key))
    check(partial(opsin.create, spec))


class Tiny(Backbone):
    """Two convolutions, two levels."""

    def __init__(self):
        super().__init__()
        self.feature_info = [FeatureInfo(12, 2), FeatureInfo(16, 4)]
        self.num_features = self.num_classes = 16
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(12, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.fc = nn.Linear(16, 16)

    def features(self, x: Tensor) -> list[Tensor]:
        first = self.first(x)
        return [first, self.second(first)]


class Good(LinearSegmenter):
    def __init__(self, num_classes: int):
        super().__init__(Tiny(), num_classes, (0.4,) * 3, (0.3,) * 3)


class CoarseMasks(Good):
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images)[..., ::2, ::2]

    def losses(self, predictions: Masks, targets: Tensor) -> dict:
        return super().losses(predictions, targets[..., ::2, ::2])


class OnlyMultiplesOfFour(Good):
    def logits(self, images: Tensor) -> Tensor:
        n, c, h, w = images.shape
        return super().logits(images.view(n, c, h // 4, 4, w // 4, 4).reshape(n, c, h, w))


class CountsIgnored(Good):
    """Divides by all pixels."""

    def losses(self, predictions: Masks, targets: Tensor) -> dict:
        return {"loss": F.cross_entropy(predictions.logits, targets, ignore_index=IGNORE, reduction="sum")
                / targets.numel()}  # fmt: skip


class NanWithoutClasses(Good):
    def losses(self, predictions: Masks, targets: Tensor) -> dict:
        return {"loss": F.cross_entropy(predictions.logits, targets, ignore_index=IGNORE)}


class CentresTheBatch(Good):
    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images - images.mean(0, keepdim=True))


class HiddenState(Good):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.register_buffer("hidden", torch.rand(num_classes, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images) * self.hidden


class SeesOneColour(Good):
    """Cannot learn: the classes differ in colour."""

    def logits(self, images: Tensor) -> Tensor:
        return super().logits(images.mean((1, 2, 3), keepdim=True).expand_as(images))


BROKEN = [
    (checks.losses_or_masks, CoarseMasks), (checks.any_size, OnlyMultiplesOfFour),
    (checks.ignored_pixels, CountsIgnored), (checks.ignored_pixels, NanWithoutClasses),
    (checks.independent_samples, CentresTheBatch), (checks.round_trip, HiddenState), (checks.overfits, SeesOneColour),
]  # fmt: skip


@pytest.mark.parametrize("check", checks.ALWAYS, ids=lambda c: c.__name__)
def test_checks_pass_a_good_member(check):
    check(Good)


@pytest.mark.parametrize(("check", "member"), BROKEN, ids=lambda p: p.__name__)
def test_checks_catch_a_broken_member(check, member: type[Segmenter]):
    with pytest.raises((AssertionError, RuntimeError)):
        check(member)


def test_every_check_has_a_broken_member():
    assert {check for check, _ in BROKEN} == set(checks.ALWAYS)


def test_metric_agrees_with_counting():
    checks.metric_agrees(lambda: Segment().metric(checks.data()))


class MeanOverBatches(Metric):
    """The usual mistake: averages the batches' scores."""

    def __init__(self):
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        labels = predicted.argmax(1) if predicted.ndim == 4 else predicted
        score = checks.reference_miou(labels.numpy(), truth.numpy(), checks.CLASSES)
        self.scores.append(torch.tensor(score))

    def compute(self) -> Tensor:
        return torch.stack(self.scores).mean()


class CountsVoid(Metric):
    """The other one: ignored pixels count as a class of their own."""

    def __init__(self):
        super().__init__()
        self.add_state("confusion", torch.zeros(5, 5, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, truth: Tensor) -> None:
        labels = predicted.argmax(1) if predicted.ndim == 4 else predicted
        flat = truth.clamp(max=4).flatten() * 5 + labels.flatten()
        self.confusion += torch.bincount(flat, minlength=25).view(5, 5)

    def compute(self) -> Tensor:
        hits = self.confusion.diag().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return (hits / union)[:4].nanmean()


@pytest.mark.parametrize("metric", [MeanOverBatches, CountsVoid])
def test_a_broken_metric_is_caught(metric):
    with pytest.raises(AssertionError):
        checks.metric_agrees(metric)
