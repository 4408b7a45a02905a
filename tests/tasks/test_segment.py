"""The segmentation task: what it accepts, the loss, the linear head, and a real run of `fit`."""

import pytest
import torch
from PIL import Image
from torch import nn

import opsin
from opsin.data import IGNORE, Data
from opsin.errors import BadInput
from opsin.tasks import Masks
from opsin.tasks.registry import task_by_name
from opsin.tasks.segment import LinearSegmenter, Segment, pixel_cross_entropy


def data(**changes) -> Data:
    fields = dict(
        name="roads", task="segment", splits={"train": []}, classes=("road", "sky", "tree"), size=(32, 48),
        mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    return Data(**(fields | changes))


def test_loss_is_the_mean_over_known_pixels():
    logits, targets = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    targets[0, :2] = IGNORE
    chosen = logits.log_softmax(1).gather(1, targets.clamp(max=2)[:, None])[:, 0]
    torch.testing.assert_close(pixel_cross_entropy(logits, targets), -chosen[targets != IGNORE].mean())
    assert pixel_cross_entropy(logits, torch.full_like(targets, IGNORE)).item() == 0


@pytest.mark.parametrize(
    "name",
    [
        "metanet_n",
        "resnet18",
        "convnext(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))",
        "swin(dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)",
    ],
)
def test_any_backbone_becomes_a_segmenter(name):
    model = Segment().wrap(opsin.create(name, num_classes=3), data()).eval()
    assert isinstance(model, LinearSegmenter)
    with torch.no_grad():
        assert model(torch.rand(1, 3, 70, 45)).logits.shape == (1, 3, 70, 45)


def test_the_classifier_of_the_backbone_is_not_trained():
    model = Segment().wrap(opsin.create("resnet(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))", num_classes=3), data())
    idle = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert idle == {"backbone.fc.weight", "backbone.fc.bias"}
    sum(model(torch.rand(1, 3, 32, 48), torch.zeros(1, 32, 48).long()).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_head_is_linear_in_every_level():
    backbone = opsin.create("resnet(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10))", num_classes=3)
    model = Segment().wrap(backbone, data()).eval()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        levels = backbone.features((image - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.2)
        stack = torch.cat([nn.functional.interpolate(x, (16, 16), mode="bilinear") for x in levels], 1)
        weight = torch.cat([head.weight for head in model.heads], 1)
        scores = nn.functional.conv2d(stack, weight, model.heads[0].bias)
        expected = nn.functional.interpolate(scores, (64, 64), mode="bilinear")
        torch.testing.assert_close(model(image).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "changes", "sentence"),
    [
        (lambda: opsin.create("metanet_n"), dict(task="classify"), "has no masks"),
        (lambda: opsin.create("metanet_n"), dict(classes=("road",)), "at least two"),
        (lambda: opsin.create("metanet_n"), dict(channels=1), "in_chans=1"),
        (lambda: nn.Conv2d(3, 3, 1), {}, "neither"),
        (lambda: opsin.create("deeplab(backbone=resnet18)", num_classes=7), {}, "num_classes=3"),
    ],
)
def test_what_does_not_fit_is_told(model, changes, sentence):
    with pytest.raises(BadInput, match=sentence):
        Segment().wrap(model(), data(**changes))


def test_a_segmenter_stays_as_it_is():
    model = opsin.create("deeplab(backbone=resnet18)", num_classes=3)
    assert Segment().wrap(model, data()) is model


def test_the_task_by_name_and_its_metric():
    task = task_by_name("segment")
    metric = task.metric(data())
    truth = torch.tensor([[[0, 0, 1, IGNORE]]])
    task.update_metric(
        metric, Masks(nn.functional.one_hot(torch.tensor([[[0, 1, 1, 2]]]), 3).permute(0, 3, 1, 2)), truth
    )
    assert metric.compute().item() == pytest.approx(0.5)  # 1/2 and 1/2; the third class occurs nowhere


def write_folders(root, count: int = 8) -> None:
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(count):
        mask = torch.zeros(32, 40, dtype=torch.uint8)
        mask[8:24, 5 + i : 25 + i] = 1
        image = (mask[..., None] * torch.tensor([90, 20, 120]) + torch.randint(0, 60, (32, 40, 3))).byte()
        Image.fromarray(image.numpy()).save(root / "images" / f"{i}.png")
        Image.fromarray(mask.numpy()).save(root / "masks" / f"{i}.png")
    (root / "classes.txt").write_text("ground\nthing\n")


@pytest.mark.parametrize("model", ["metanet_n", "deeplab(backbone='resnet(depths=(1,1), dims=(8, 16))', rates=(1, 2))"])
def test_fit_trains_from_folders_of_masks(tmp_path, model):
    write_folders(tmp_path / "data")
    run = opsin.fit(
        model, str(tmp_path / "data"), epochs=12, batch_size=2, lr=5e-3, out=tmp_path / "run", logger=False,
        progress=False, augment=False,
    )  # fmt: skip
    best = run.model().eval()
    image, mask = opsin.data.open(str(tmp_path / "data")).test[0]
    with torch.no_grad():
        assert (best(image[None]).labels[0] == mask).float().mean() > 0.85
