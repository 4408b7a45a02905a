"""The contract of detectors, over every card of the kind and centre heads on a backbone, and over broken members.

A card's fact `small` names a variant that is quick to train.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.catalog import list_cards
from opsin.data import Boxes
from opsin.measure.quality import VocAP
from opsin.tasks import Detections, TaskModel
from opsin.tasks.centernet import HEAT_BIAS, CentreDetector, Heads, PyramidDetector, plain_head
from opsin.tasks.detect import as_metric_rows

Build = Callable[[], TaskModel]
CLASSES, SIDE = 2, 64
BACKBONE = "shufflenet_v2_x0_5(dims=(16, 32, 48, 64, 64), stem_stride=1)"


def scenes(count: int = 8) -> tuple[Tensor, list[Boxes]]:
    """Grey noise with one light rectangle of class 0 and one dark one of class 1, the first image without any."""
    draw, targets = torch.Generator().manual_seed(0), []
    images = 0.5 + 0.03 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    for image in images:
        boxes = []
        for label, colour in enumerate((0.95, 0.05)):
            width, height = torch.randint(14, 26, (2,), generator=draw).tolist()
            x, y = torch.randint(0, 6, (2,), generator=draw).tolist()
            x, y = x + 32 * label, y + 30 * int(torch.randint(2, (), generator=draw))
            if len(targets):
                image[:, y : y + height, x : x + width] = colour
                boxes.append((x, y, x + width, y + height))
        targets.append(Boxes(torch.tensor(boxes).float().reshape(-1, 4), torch.arange(len(boxes))))
    return images.clamp(0, 1), targets


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def losses_with_targets(build: Build) -> None:
    """Finite scalars by name, that reach every parameter; also for images without objects."""
    model = build().train()
    images, targets = scenes()
    losses = model(images, targets)
    assert isinstance(losses, dict) and losses
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    total(losses).backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not idle, f"no gradient reaches {idle}"
    assert total(model(images[:1].repeat(2, 1, 1, 1), targets[:1] * 2)).isfinite(), "without any object"


@torch.no_grad()
def sound_detections(build: Build) -> None:
    """`Detections`: corners inside the image, known classes, scores between 0 and 1 that fall; at any size."""
    model = build().eval()
    for height, width in ((SIDE, SIDE), (37, 90)):
        found = model(torch.rand(2, 3, height, width))
        assert isinstance(found, Detections) and len(found.boxes) == len(found.scores) == 2
        for (boxes, labels), scores in zip(found.boxes, found.scores, strict=True):
            assert boxes.shape == (len(labels), 4) and scores.shape == labels.shape
            assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all(), "outside the image"
            assert labels.dtype == torch.long and (labels >= 0).all() and (labels < CLASSES).all()
            assert (scores >= 0).all() and (scores <= 1).all() and (scores.diff() <= 0).all(), "not best first"


@torch.no_grad()
def independent_samples(build: Build) -> None:
    """In eval, what is found in an image does not depend on the batch."""
    model, images = build().eval(), scenes(3)[0]
    together, alone = model(images), model(images[1:2])
    assert torch.allclose(together.scores[1], alone.scores[0], atol=1e-5), "the batch changes the scores"


def overfits(build: Build, steps: int = 90) -> None:
    """Eight images are learned by heart, as AP50 says."""
    model = build().train()
    images, targets = scenes()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 8e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        total(model(images, targets)).backward()
        nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        schedule.step()
    metric = VocAP(CLASSES)
    with torch.no_grad():
        metric.update(*as_metric_rows(model.eval()(images), targets))
    assert metric.compute() > 0.8, f"AP50 of {metric.compute():.2f} on what it was trained on"


CHECKS = (losses_with_targets, sound_detections, independent_samples, overfits)


class Good(CentreDetector):
    """Four convolutions and the heads."""

    def __init__(self) -> None:
        super().__init__((0.5,) * 3, (0.25,) * 3)
        self.num_classes, self.stride, self.multiple = CLASSES, 4, 8
        layers: list[nn.Module] = []
        for dim_in, dim, stride in ((3, 16, 2), (16, 32, 2), (32, 32, 2), (32, 48, 1)):
            layers += [nn.Conv2d(dim_in, dim, 5, stride, 2, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
        self.body = nn.Sequential(*layers, nn.Upsample(scale_factor=2), nn.Conv2d(48, 32, 3, padding=1), nn.ReLU())
        self.heat, self.size, self.offset = (plain_head(32, outputs) for outputs in (CLASSES, 2, 2))
        nn.init.constant_(self.heat[-1].bias, HEAT_BIAS)

    def heads(self, images: Tensor) -> Heads:
        x = self.body(images)
        return Heads(self.heat(x), self.size(x), self.offset(x))


class ForgetsTheOffset(Good):
    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Detections | dict:
        out = super().forward(images, targets)
        return out if targets is None else {name: loss for name, loss in out.items() if name != "offset"}


class DividesByObjects(Good):
    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Detections | dict:
        out = super().forward(images, targets)
        return out if targets is None else {n: v / sum(len(t.labels) for t in targets) for n, v in out.items()}


class GivesATensor(Good):
    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Tensor | dict:
        out = super().forward(images, targets)
        return out.table if targets is None else out


class WorstFirst(Good):
    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Detections | dict:
        out = super().forward(images, targets)
        return Detections(out.boxes, [s.flip(0) for s in out.scores]) if targets is None else out


class LeavesTheImage(Good):
    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Detections | dict:
        out = super().forward(images, targets)
        return Detections([Boxes(b.boxes - 3, b.labels) for b in out.boxes], out.scores) if targets is None else out


class CentresTheBatch(Good):
    def heads(self, images: Tensor) -> Heads:
        return super().heads(images - images.mean(0, keepdim=True))


class AnswersOnTheMap(Good):
    """Boxes in positions of the map and not in pixels."""

    def forward(self, images: Tensor, targets: list[Boxes] | None = None) -> Detections | dict:
        out = super().forward(images, targets)
        return Detections([Boxes(b.boxes / 4, b.labels) for b in out.boxes], out.scores) if targets is None else out


BROKEN = [
    (losses_with_targets, ForgetsTheOffset), (losses_with_targets, DividesByObjects), (sound_detections, GivesATensor),
    (sound_detections, WorstFirst), (sound_detections, LeavesTheImage), (independent_samples, CentresTheBatch),
    (overfits, AnswersOnTheMap),
]  # fmt: skip


def on_a_backbone() -> TaskModel:
    return PyramidDetector(opsin.create(BACKBONE, num_classes=0), CLASSES, mean=(0.5,) * 3, std=(0.25,) * 3)


MEMBERS = {card.key: card.facts.get("small", card.key) for card in list_cards("detector")}
BUILDS: dict[str, Build] = {
    **{key: lambda spec=spec: opsin.create(spec, num_classes=CLASSES) for key, spec in MEMBERS.items()},
    "on_a_backbone": on_a_backbone, "good": Good,
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
@pytest.mark.parametrize("member", BUILDS)
def test_contract(member, check):
    torch.manual_seed(0)
    check(BUILDS[member])


@pytest.mark.parametrize(("check", "member"), BROKEN, ids=lambda p: p.__name__)
def test_checks_catch_a_broken_member(check, member):
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check(member)


def test_every_check_has_a_broken_member():
    assert {check for check, _ in BROKEN} == set(CHECKS)
