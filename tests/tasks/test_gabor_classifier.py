"""The two-branch classifier: boxes, the hard gate, what is skipped, and that it learns texture."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.ops.conv.gabor_texture import GaborFilters, parameter_groups
from opsin.tasks.gabor_classifier import (
    GaborClassifier,
    RegionClasses,
    RegionGate,
    TextureBranch,
    box_means,
    cut_out,
    grid_boxes,
)


def classifier(**options: object) -> GaborClassifier:
    return GaborClassifier(num_classes=3, filters=8, **options)


def opened(model: GaborClassifier, score: float) -> GaborClassifier:
    """The gate lets everything (score > 0) or nothing through."""
    nn.init.zeros_(model.network.gate.score.weight)
    nn.init.constant_(model.network.gate.score.bias, score)
    return model.eval()


def test_boxes_lie_in_the_image_and_cover_it():
    boxes = grid_boxes((1.0, 0.5, 1 / 3))
    assert len(boxes) == 1 + 9 + 25 and boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert torch.allclose(boxes[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    sides = boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(sides[1:10], torch.full((9, 2), 0.5)) and torch.allclose(
        sides[10:], torch.full((25, 2), 1 / 3)
    )
    for point in torch.rand(50, 2):
        assert ((boxes[10:, :2] <= point) & (point <= boxes[10:, 2:])).all(1).any()


def test_means_over_boxes():
    maps = torch.randn(2, 3, 4, 6)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.75], [0.25, 0.0, 0.5, 0.25]])
    means = box_means(maps, boxes)
    assert torch.allclose(means[:, 0], maps.mean((2, 3)), atol=1e-6)
    assert torch.allclose(means[:, 1], maps[:, :, 1:3, 3:].mean((2, 3)), atol=1e-6)
    expected = (0.5 * maps[:, :, 0, 1] + maps[:, :, 0, 2]) / 1.5  # half of a column
    assert torch.allclose(means[:, 2], expected, atol=1e-6)


def test_regions_are_cut_out_of_their_image():
    images = torch.rand(3, 2, 8, 12)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.5, 0.25, 1.0, 0.75]])
    regions = cut_out(images, torch.tensor([2, 1]), boxes, 4)
    expected = F.interpolate(images[2:3], (4, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(regions[:1], expected, atol=1e-5)
    expected = F.interpolate(images[1:2, :, 2:6, 6:], (4, 4), mode="bilinear", align_corners=False)
    assert torch.allclose(regions[1:], expected, atol=1e-5)


def test_the_gate_is_hard_forwards_and_soft_backwards():
    torch.manual_seed(0)
    gate, features = RegionGate(6), torch.randn(200, 5, 6)
    decided, tried = gate(features)
    score = gate.score(gate.norm(features))[..., 0]
    assert torch.equal(decided.detach(), (score > 0).float()) and set(tried.detach().unique().tolist()) == {0.0, 1.0}
    agree = (tried.detach() == decided.detach()).float().mean()
    assert 0.5 < agree < 0.9, "the noise tries other regions in training"
    decided.sum().backward()
    soft = score.sigmoid()
    slope = (soft * (1 - soft)).detach()
    assert gate.score.bias.grad is not None and gate.score.bias.grad.item() == pytest.approx(
        float(slope.sum()), rel=1e-4
    )
    for p in (0.2, 0.7):  # tried as often as the sigmoid says
        nn.init.zeros_(gate.score.weight)
        nn.init.constant_(gate.score.bias, math.log(p / (1 - p)))
        assert gate(features)[1].mean().item() == pytest.approx(p, abs=0.05)
    decided, tried = gate.eval()(features)
    assert torch.equal(decided, tried)


def test_only_kept_regions_are_computed():
    images, seen = torch.rand(4, 3, 32, 32), []
    model = classifier(scales=(0.5,)).eval()
    model.network.texture.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    kept = model(images).kept
    assert 0 < kept.sum() < kept.numel() and seen == [int(kept.sum())]
    opened(model, -1.0)
    assert not model(images).kept.any() and len(seen) == 1, "nothing kept, nothing computed"
    opened(model, 1.0)
    assert model(images).kept.all() and seen[1:] == [4 * 9]


@torch.no_grad()
def test_features_of_kept_regions_are_added():
    model, images = opened(classifier(scales=(0.5,)), 1.0), torch.rand(2, 3, 32, 32)
    net = model.network
    semantic = net.norm(net.backbone.features(images)[-1].mean((2, 3)))
    regions = [cut_out(images, torch.arange(2), box.expand(2, 4), net.side) for box in net.boxes]
    expected = net.head(semantic + sum(net.texture(r) for r in regions))
    assert torch.allclose(model(images).logits, expected, atol=1e-4)
    opened(model, -1.0)
    assert torch.allclose(model(images).logits, net.head(semantic), atol=1e-5)


def test_losses_hold_the_budget():
    model, images, labels = (
        classifier(budget=0.25, budget_weight=2.0),
        torch.rand(4, 3, 32, 32),
        torch.tensor([0, 1, 2, 0]),
    )
    opened(model, 5.0).train()
    losses = model(images, labels)
    assert losses["budget"].item() == pytest.approx(2 * 0.75**2)
    losses["budget"].backward()
    assert model.network.gate.score.bias.grad.item() > 0, "the gate is pushed to close"
    logits = model.eval()(images).logits
    assert model(images, labels)["loss"].item() == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)


def test_the_gate_learns_its_budget():
    torch.manual_seed(0)
    model, images = classifier(budget=0.3, scales=(0.5,)), torch.rand(8, 3, 32, 32)
    features = box_means(model.network.backbone.features(images)[-1], model.network.boxes).detach()
    optimiser = torch.optim.Adam(model.network.gate.parameters(), 0.02)
    for _ in range(100):
        optimiser.zero_grad()
        kept, _ = model.network.gate(features)
        model.losses(RegionClasses(torch.zeros(8, 3), kept), torch.zeros(8, dtype=torch.long))["budget"].backward()
        optimiser.step()
    assert model.network.gate(features)[0].mean().item() == pytest.approx(0.3, abs=0.08)


def test_gradients_reach_every_part():
    model = classifier(scales=(0.5,))
    model(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))["loss"].backward()  # the gate's without the budget
    parts = {"gate": model.network.gate, "texture": model.network.texture, "head": model.network.head}
    for part in parts.values():
        assert all(p.grad is not None and p.grad.any() for p in part.parameters())
    rest, gabor = parameter_groups(model, 1e-3)
    assert len(gabor["params"]) == 5 and gabor["lr"] < rest["lr"]


def test_statistics_do_not_see_brightness_or_where_a_texture_is():
    branch = TextureBranch(GaborFilters(8), 8, 6)
    axis = torch.arange(40.0)
    tiles = torch.sin(2 * math.pi * axis / 10) * torch.cos(2 * math.pi * axis[:, None] / 5)  # repeats every 10 pixels
    regions = torch.stack([tiles[:30, :30], tiles[3:33, 7:37], tiles[:30, :30] + 0.4])[:, None]
    a, moved, brighter = branch(regions)
    assert torch.allclose(a, brighter, atol=1e-4)
    (pairs, shifted, _), (neighbours, shifted_neighbours, _) = branch.statistics(regions)
    assert torch.allclose(pairs, shifted, atol=1e-3), "responses of 20x20 hold whole periods"
    assert (neighbours - shifted_neighbours).abs().max() < 0.1 * neighbours.max(), "but for the pairs over the edge"
    assert (branch(torch.randn(1, 1, 30, 30))[0] - a).abs().max() > 2 * (moved - a).abs().max()


def test_textures_are_told_apart_by_a_frozen_backbone():
    """Random phases of three gratings: the mean pixel says nothing, the texture branch alone learns them."""
    torch.manual_seed(0)
    angles, axis = torch.tensor([0.3, 1.2, 2.4]), torch.arange(32.0)

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(3, (n,))
        t, phase = angles[labels, None, None], 6.3 * torch.rand(n, 1, 1)
        waves = torch.sin(2 * math.pi / 5 * (axis * t.cos() + axis[:, None] * t.sin()) + phase)
        return (0.5 + 0.2 * waves + 0.2 * torch.randn(n, 32, 32))[:, None].expand(-1, 3, -1, -1), labels

    model = GaborClassifier(num_classes=3, filters=16, scales=(1.0,), budget=1.0)
    opened(model, 3.0).train()
    model.network.backbone.requires_grad_(False)
    nn.init.zeros_(model.network.norm.weight).requires_grad_(False)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(40):
        optimiser.zero_grad()
        torch.stack(list(model(*batch(16)).values())).sum().backward()
        optimiser.step()
    images, labels = batch(64)
    assert (model.eval()(images).labels == labels).float().mean() > 0.9


def test_it_is_built_by_name_around_any_backbone():
    model = opsin.create("gabor_classifier", backbone="resnet18", num_classes=5, in_chans=1)
    predictions = model.eval()(torch.rand(2, 1, 64, 64))
    assert isinstance(predictions, RegionClasses) and predictions.logits.shape == (2, 5)
    assert predictions.kept.shape == (2, 10)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="side=11 pixels"):
        classifier(side=11)
    with pytest.raises(BadInput, match="budget=0"):
        classifier(budget=0)
    with pytest.raises(BadInput, match="scales="):
        classifier(scales=(1.5,))


@pytest.mark.parametrize("scale", [0.3, 0.5, 0.7, 0.9, 1.0])
def test_the_boxes_of_every_scale_reach_all_corners(scale):
    boxes = grid_boxes([scale])
    assert boxes.amin(0)[:2].tolist() == [0, 0] and torch.allclose(boxes.amax(0)[2:], torch.ones(2))
