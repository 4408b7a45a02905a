"""Centre targets, losses and peaks with the numbers of the published code, and the CoDeNet detector."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import opsin
from opsin.data import Boxes
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_macs, count_params
from opsin.ops.conv.deformable import DeformConv2d
from opsin.tasks import Detections
from opsin.tasks.centernet import Heads, centre_losses, decode, draw_targets, focal_loss, gaussian_radius, peaks
from opsin.tasks.codenet import VARIANTS, CoDeNet, remap
from opsin.tasks.outputs import TensorOutput

SMALL = dict(dims=(16, 24, 48, 96, 64), decoder_dims=(48, 32, 24))
# Zhen-Dong/CoDeNet, PoseShuffleNetV2 (3 classes, stem of stride 4) with the parameters of `fill` and the image
# wave(1, 3, 64, 96), its CUDA operator replaced by loops: hm, wh and reg at (5, 7) and (12, 20).
OFFICIAL = [
    [-0.17097, -0.41187, 0.20763, 0.15322, 0.54681, 0.95934, 0.21609],
    [-0.20363, -0.42552, 0.20295, 0.17234, 0.54283, 0.95475, 0.21712],
]


def wave(*shape: int, phase: int = 0) -> Tensor:
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) ** 1.5 + phase).float().view(shape)


@torch.no_grad()
def fill(net: nn.Module) -> None:
    for i, (name, p) in enumerate(net.named_parameters()):
        w = wave(*p.shape, phase=i)
        p.copy_(w * (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 1 + 0.3 * w if name.endswith("weight") else 0.3 * w)
        if "conv_scale.weight" in name:
            p.mul_(0.3)


@torch.no_grad()
def test_numbers_of_the_official_network():
    net = CoDeNet(num_classes=3, mean=(), std=()).eval()
    fill(net)
    heads = net.heads(wave(1, 3, 64, 96))
    for (row, column), expected in zip(((5, 7), (12, 20)), OFFICIAL, strict=True):
        ours = torch.cat([part[0, :, row, column] for part in heads])
        assert torch.allclose(ours, torch.tensor(expected), atol=2e-5)


def test_official_names():
    state = {
        "layer0.0.weight": 0, "layer1.0.b1.0.weight": 1, "layer3.2.b2.6.bias": 2, "layer4.1.running_mean": 3,
        "deconv_layers.4.conv_scale.bias": 4, "deconv_layers.8.conv_channel.weight": 5, "hm.6.bias": 6,
    }  # fmt: skip
    with torch.device("meta"):
        names = set(CoDeNet().state_dict())
    assert len(remap(state)) == 7 and set(remap(state)) <= names


@pytest.mark.parametrize(
    ("name", "side", "macs", "mib"),
    [
        ("codenet1x_a", 256, 0.29, 0.76), ("codenet1x_b", 256, 0.29, 0.76), ("codenet1x_c", 512, 1.14, 0.76),
        ("codenet2x_d", 512, 3.54, 2.90), ("codenet2x_e", 512, 3.58, 2.90), ("codenet1x_coco_fp32", 512, 1.24, 6.07),
    ],
)  # fmt: skip
def test_published_sizes_by_the_published_count(name, side, macs, mib):
    """Which adds two operations per value of a batch norm, and does not see the deformable filters."""
    with torch.device("meta"):
        net, extra = opsin.create(name).eval(), []
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(lambda m, i, out: extra.append(2 * out.numel()))
            if isinstance(module, DeformConv2d):
                module.register_forward_hook(lambda m, i, out: extra.append(-9 * out.numel()))
        counted = count_macs(net, torch.empty(1, 3, side, side)) + sum(extra)
    assert counted / 1e9 == pytest.approx(macs, abs=0.006)
    assert net.model_megabytes(32 if mib > 6 else 4) == pytest.approx(mib, abs=0.005)
    assert count_params(net) / 1e6 == pytest.approx(6.082 if "2x" in name else 1.588, rel=3e-3)


def test_variants_of_the_card_are_built():
    assert set(VARIANTS) == set(opsin.catalog.card_of("codenet").variants)


def test_radius_of_the_published_code():
    sizes = torch.tensor([[3.0, 4], [10, 10], [17, 5], [40, 33], [1, 1]])
    assert torch.allclose(
        gaussian_radius(sizes), torch.tensor([0.93866, 2.73320, 2.16588, 9.89188, 0.27332]), atol=1e-4
    )


TARGETS = [
    Boxes(torch.tensor([[3.0, 5, 30, 41], [50, 10, 63, 60], [20, 20, 40, 42]]), torch.tensor([0, 2, 0])),
    Boxes(torch.tensor([[0.0, 0, 96, 64]]), torch.tensor([1])),
]


def drawn_one_by_one(targets: list[Boxes], classes: int, height: int, width: int) -> np.ndarray:
    heat = np.zeros((len(targets), classes, height, width))
    for n, target in enumerate(targets):
        for (x0, y0, x1, y1), label in zip((target.boxes / 4).tolist(), target.labels.tolist(), strict=True):
            size = torch.tensor([[math.ceil(x1 - x0), math.ceil(y1 - y0)]]).float()
            radius, x, y = int(gaussian_radius(size)), int((x0 + x1) / 2), int((y0 + y1) / 2)
            sigma = (2 * radius + 1) / 6
            for i in range(max(0, y - radius), min(height, y + radius + 1)):
                for j in range(max(0, x - radius), min(width, x + radius + 1)):
                    value = math.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * sigma**2))
                    heat[n, label, i, j] = max(heat[n, label, i, j], value)
    return heat


def test_targets():
    drawn = draw_targets(TARGETS, (16, 24), 4, 3)
    assert np.abs(drawn.heat.numpy() - drawn_one_by_one(TARGETS, 3, 16, 24)).max() < 1e-6
    assert drawn.heat.sum().item() == pytest.approx(28.57597, abs=1e-4), "of the published code"
    assert (drawn.heat == 1).sum() == 4 and drawn.image.tolist() == [0, 0, 0, 1]
    assert drawn.position.tolist() == [5 * 24 + 4, 8 * 24 + 14, 7 * 24 + 7, 8 * 24 + 12]
    assert torch.allclose(drawn.size[0], torch.tensor([6.75, 9.0]))
    assert torch.allclose(drawn.offset[0], torch.tensor([0.125, 0.75]))


def test_targets_at_the_edge_and_without_objects():
    none = Boxes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    edge = Boxes(torch.tensor([[90.0, 60, 102, 68], [0, 0, 1, 1]]), torch.tensor([0, 1]))
    drawn = draw_targets([none, edge], (16, 24), 4, 2)
    assert not drawn.heat[0].any() and drawn.position.tolist() == [15 * 24 + 23, 0]
    losses = centre_losses(Heads(*(torch.zeros(1, c, 16, 24) for c in (2, 2, 2))), draw_targets([none], (16, 24), 4, 2))
    assert losses["size"] == 0 == losses["offset"] and losses["heat"].item() == pytest.approx(768 * 0.25 * math.log(2))


def test_focal_loss_is_equation_one():
    torch.manual_seed(0)
    logits, heat = torch.randn(2, 3, 16, 24) * 2 - 2, draw_targets(TARGETS, (16, 24), 4, 3).heat
    y, total = logits.sigmoid(), torch.zeros(())
    for p, t in zip(y.flatten(), heat.flatten(), strict=True):
        total -= (1 - p) ** 2 * p.log() if t == 1 else (1 - t) ** 4 * p**2 * (1 - p).log()
    assert focal_loss(logits, heat).item() == pytest.approx(total.item() / 4, rel=1e-4)
    assert focal_loss(torch.full_like(logits, -200.0), heat).isfinite()


def perfect_heads(targets: list[Boxes]) -> Heads:
    drawn = draw_targets(targets, (16, 24), 4, 3)
    size, offset = torch.zeros(2, len(targets), 2, 16 * 24)
    for image, place, wh, shift in zip(drawn.image, drawn.position, drawn.size, drawn.offset, strict=True):
        size[image, :, place], offset[image, :, place] = wh, shift
    maps = (m.unflatten(2, (16, 24)) for m in (size, offset))
    return Heads(torch.logit(drawn.heat, 1e-6), *maps)


def test_what_is_drawn_is_found():
    found = decode(perfect_heads(TARGETS), 4, (64, 96), top=3)
    assert isinstance(found, Detections) and found.table.shape == (2, 3, 6)
    order = found.boxes[0].labels.argsort(stable=True)
    boxes = found.boxes[0].boxes[order]
    assert found.boxes[0].labels[order].tolist() == [0, 0, 2]
    truth = TARGETS[0].boxes[[0, 2, 1]]
    assert torch.allclose(boxes.sort(0).values, truth.sort(0).values, atol=1e-3)
    assert torch.allclose(found.boxes[1].boxes[0], TARGETS[1].boxes[0], atol=1e-3)
    losses = centre_losses(perfect_heads(TARGETS), draw_targets(TARGETS, (16, 24), 4, 3))
    assert losses["size"] == 0 == losses["offset"]


def test_weights_of_the_losses():
    drawn, heads = draw_targets(TARGETS, (16, 24), 4, 3), perfect_heads(TARGETS)
    moved = centre_losses(Heads(heads.heat, heads.size + 2, heads.offset + 2), drawn)
    assert moved["size"].item() == pytest.approx(0.2) and moved["offset"].item() == pytest.approx(2.0)


def test_peaks_suppress_neighbours_and_scores_fall():
    heat = torch.zeros(1, 1, 6, 6)
    heat[0, 0, 2, 2], heat[0, 0, 2, 3], heat[0, 0, 5, 5] = 3.0, 2.0, 1.0
    assert peaks(heat)[0, 0, 2, 2] and not peaks(heat)[0, 0, 2, 3] and peaks(heat)[0, 0, 5, 5]
    found = decode(Heads(heat, torch.ones(1, 2, 6, 6), torch.zeros(1, 2, 6, 6)), 1, (6, 6), top=2)
    assert found.boxes[0].boxes[0].tolist() == [1.5, 1.5, 2.5, 2.5]
    assert found.boxes[0].boxes[1].tolist() == [4.5, 4.5, 5.5, 5.5] and found.scores[0][0] > found.scores[0][1]


@torch.no_grad()
def test_any_image_size_and_padding_changes_little():
    net = CoDeNet(**SMALL, num_classes=3).eval()
    for size in ((40, 70), (64, 96)):
        found = net(torch.rand(2, 3, *size))
        limits = torch.tensor([size[1], size[0]] * 2)
        assert all((b.boxes >= 0).all() and (b.boxes <= limits).all() for b in found.boxes)


def test_the_low_precision_form_learns_and_reloads():
    net = CoDeNet(**SMALL, num_classes=3)
    low, images = net.quantised(), torch.rand(2, 3, 64, 96)
    first = low.backbone.conv1[0]
    assert len(first.weight[0].unique()) > 16, "the stem keeps 8 bits"
    assert all(len(row.unique()) <= 16 for row in low.deconv_layers[4].conv_channel.weight)
    losses = low(images, TARGETS)
    torch.stack(list(losses.values())).sum().backward()
    idle = [n for n, p in low.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle, idle
    again = CoDeNet(**SMALL, num_classes=3).quantised()
    again.load_state_dict(low.state_dict())
    assert torch.equal(again.eval()(images).table, low.eval()(images).table)


@torch.no_grad()
def test_it_is_exported_for_any_batch():
    net, images = TensorOutput(CoDeNet(**SMALL, num_classes=2)).eval(), torch.rand(3, 3, 48, 64)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(net, (images[:2],), dynamic_shapes=(batch,)).module()
    assert torch.allclose(program(images)[:, :20], net(images)[:, :20], atol=1e-3)


def test_complaints_are_sentences():
    with pytest.raises(UnknownName, match="stride5"):
        CoDeNet(stem="stride5")
    with pytest.raises(BadInput, match="beyond the detector's 2"):
        CoDeNet(**SMALL, num_classes=2)(torch.rand(2, 3, 64, 96), TARGETS)
