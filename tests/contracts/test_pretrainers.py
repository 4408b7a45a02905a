"""What every pre-trainer must pass, and members that must not."""

import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.backbones import Backbone
from opsin.catalog import list_cards
from opsin.pretrain import Pretrainer

SMALL = {
    "vit": "vit_tiny_patch16_224(image_size=32, patch_size=4, dim=32, depth=2, num_heads=2, num_classes=0)",
    "swin": "swin_tiny_patch4_window7_224(dim=16, image_size=32, depths=(2, 2), num_heads=(2, 2), window_size=4,"
    " patch_size=2, num_classes=0)",
}
MEMBERS = [
    (card.key, backbone) for card in list_cards("pretrainer") for backbone in card.facts["backbones"]
]  # fmt: skip


def pictures(n: int = 24) -> Tensor:
    """Images with structure: a few random blobs each, normalised."""
    torch.manual_seed(2)
    coarse = torch.randn(n, 3, 4, 4)
    x = nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return (x - x.mean()) / x.std()


def member(name: str, backbone: str) -> Pretrainer:
    torch.manual_seed(0)
    return opsin.create(name, backbone=SMALL[backbone], mask_patch=8)


def trained(pretrainer: Pretrainer, steps: int = 50) -> list[float]:
    optimiser = torch.optim.AdamW([p for p in pretrainer.parameters() if p.requires_grad], lr=3e-3)
    x, losses = pictures(), []
    pretrainer.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.stack(list(pretrainer(x).values())).sum()
        if loss.requires_grad:
            loss.backward()
            optimiser.step()
        losses.append(float(loss.detach()))
    return losses


def feature_rank(f: Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values of the centred features."""
    s = torch.linalg.svdvals(f - f.mean(0))
    p = (s / s.sum()).clamp(min=1e-12)
    return float(torch.exp(-(p * p.log()).sum()))


def check_loss_falls(pretrainer: Pretrainer) -> None:
    losses = trained(pretrainer)
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])


def check_no_collapse(pretrainer: Pretrainer) -> None:
    trained(pretrainer)
    with torch.no_grad():
        f = pretrainer.backbone.eval()(pictures())
    assert (f - f.mean(0)).norm() > 0.05 * f.norm(), "all images have the same features"
    assert feature_rank(f) > 3


def check_backbone_is_ordinary_afterwards(pretrainer: Pretrainer) -> None:
    trained(pretrainer, steps=2)
    backbone, x = pretrainer.backbone.eval(), pictures(2)
    assert isinstance(backbone, Backbone)
    maps = backbone.features(x)
    assert [m.shape[1] for m in maps] == [info.channels for info in backbone.feature_info]
    assert backbone(x).shape == (2, backbone.num_features)
    assert torch.equal(backbone(x), backbone(x)), "the backbone must not be masked any more"


def check_gradients_reach_the_backbone(pretrainer: Pretrainer) -> None:
    torch.stack(list(pretrainer(pictures(4)).values())).sum().backward()
    untouched = [
        name
        for name, p in pretrainer.backbone.named_parameters()
        if p.grad is None and not name.startswith(("norm", "fc_norm", "head"))
    ]
    assert not untouched


def check_losses_are_finite_scalars(pretrainer: Pretrainer) -> None:
    losses = pretrainer(pictures(4))
    assert losses and all(v.ndim == 0 and v.isfinite() for v in losses.values())


CHECKS = [
    check_loss_falls, check_no_collapse, check_backbone_is_ordinary_afterwards, check_gradients_reach_the_backbone,
    check_losses_are_finite_scalars,
]  # fmt: skip


@pytest.mark.parametrize(("name", "backbone"), MEMBERS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_contract(name, backbone, check):
    check(member(name, backbone))


class Broken(Pretrainer):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = opsin.create(SMALL["vit"])


class NoLearning(Broken):
    def forward(self, images):
        return {"loss": torch.ones(())}


class Collapses(Broken):
    """Pulls all images of a batch together, with nothing to push them apart."""

    def forward(self, images):
        f = self.backbone(images)
        return {"loss": (f - f.mean(0)).square().mean()}


class StaysMasked(Broken):
    def __init__(self):
        super().__init__()
        forward = self.backbone.forward_head
        self.backbone.forward_head = lambda x: forward(x * (torch.rand_like(x) > 0.5))

    def forward(self, images):
        return {"loss": self.backbone(images).std()}


class Detached(Broken):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(32, 1)

    def forward(self, images):
        with torch.no_grad():
            f = self.backbone(images)
        return {"loss": self.head(f).square().mean()}


class NotANumber(Broken):
    def forward(self, images):
        return {"loss": self.backbone(images).sum() * float("nan")}


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (NoLearning, check_loss_falls),
        (Collapses, check_no_collapse),
        (StaysMasked, check_backbone_is_ordinary_afterwards),
        (Detached, check_gradients_reach_the_backbone),
        (NotANumber, check_losses_are_finite_scalars),
    ],
)
def test_broken_members_are_caught(broken, check):
    with pytest.raises(AssertionError):
        check(broken())
