"""DeepLab-v2: the operator, the sizes, the PyTorch port's figures on the same weights, losses, and training helpers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.catalog import card_of
from opsin.data import IGNORE
from opsin.errors import BadInput
from opsin.tasks.crf import DenseCRF
from opsin.tasks.deeplab import (
    MEAN,
    VARIANTS,
    AtrousConv,
    AtrousPyramid,
    DeepLab,
    freeze_batch_norms,
    parameter_groups,
    published_optimizer,
    remap,
    shrink_labels,
)  # fmt: skip
from opsin.tasks.segment import pixel_cross_entropy

SMALL = "resnet(depths=(1, 1, 1, 1), dims=(4, 6, 8, 10), output_stride=8, ceil_pool=True, stride_in_1x1=True)"


@pytest.mark.parametrize("rate", [1, 2, 5])
def test_a_hole_is_a_zero_in_the_kernel_and_a_phase_of_the_image(rate):
    """The three definitions of section 3.1 agree, and the parameters do not depend on the rate."""
    conv, x = AtrousConv(3, 4, rate), torch.randn(2, 3, 20, 25)
    stuffed = torch.zeros(4, 3, 2 * rate + 1, 2 * rate + 1)
    stuffed[:, :, ::rate, ::rate] = conv.weight
    torch.testing.assert_close(conv(x), F.conv2d(x, stuffed, conv.bias, padding=rate), atol=1e-5, rtol=1e-5)
    phases = torch.zeros_like(conv(x))
    for i in range(rate):
        for j in range(rate):
            phases[:, :, i::rate, j::rate] = F.conv2d(x[:, :, i::rate, j::rate], conv.weight, conv.bias, padding=1)
    torch.testing.assert_close(conv(x), phases, atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in conv.parameters()) == 4 * 3 * 9 + 4


def test_the_pyramid_sums_its_branches():
    aspp, x = AtrousPyramid(8, 5, (1, 2, 3)), torch.randn(1, 8, 9, 9)
    torch.testing.assert_close(aspp(x), aspp.c0(x) + aspp.c1(x) + aspp.c2(x))
    assert all(0.005 < layer.weight.std() < 0.015 and not layer.bias.any() for layer in aspp.classifiers())
    deep = AtrousPyramid(8, 5, (2, 4), hidden=16)
    assert [layer.kernel_size for layer in deep.classifiers()] == [(1, 1), (1, 1)]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_sizes_and_strides(name):
    with torch.device("meta"):
        model = opsin.create(name).eval()
        count = sum(p.numel() for p in model.parameters())
        assert count / 1e6 == pytest.approx(card_of(name).variants[name].params_m, rel=0.001)
        assert model.score_maps(torch.empty(1, 3, 321, 321))[-1].shape == (1, 21, 41, 41)
        assert model.score_maps(torch.empty(1, 3, 513, 513))[0].shape == (1, 21, 65, 65)


def test_the_trunk_is_the_caffe_one():
    """Stride in the 1x1, ceil-mode pooling, and one dilation for all 3x3 convolutions of a stage."""
    with torch.device("meta"):
        trunk = opsin.create("deeplab_v2_resnet101").backbone
    assert trunk.maxpool.ceil_mode
    assert trunk.layer2[0].conv1.stride == (2, 2) and trunk.layer2[0].conv2.stride == (1, 1)
    assert {block.conv2.dilation for block in trunk.layer3} == {(2, 2)}
    assert {block.conv2.dilation for block in trunk.layer4} == {(4, 4)}
    with torch.device("meta"):
        vgg = opsin.create("deeplab_v2_vgg16_aspp_l").backbone.layers
    convs = [layer for layer in vgg if isinstance(layer, nn.Conv2d)]
    assert [c.dilation[0] for c in convs] == [1] * 10 + [2] * 3
    assert [p.stride for p in vgg if isinstance(p, nn.MaxPool2d)] == [2, 2, 2, 1, 1]


def waves(shape: tuple[int, ...], scale: float) -> Tensor:
    """The same numbers on every machine."""
    count = torch.arange(torch.Size(shape).numel())
    return (scale * torch.sin(0.37 * (count % 997) + 0.11 * (count % 89).double().square())).view(shape).float()


def port_state(classes: int) -> dict[str, Tensor]:
    """A state dict in the port's names, for one block per stage."""
    shapes: dict[str, tuple[int, int, int]] = {"layer1.conv1": (64, 3, 7)}
    dim_in = 64
    for stage, dim in enumerate((256, 512, 1024, 2048), 2):
        block, mid = f"layer{stage}.block1", dim // 4
        shapes |= {f"{block}.reduce": (mid, dim_in, 1), f"{block}.conv3x3": (mid, mid, 3),
                   f"{block}.increase": (dim, mid, 1), f"{block}.shortcut": (dim, dim_in, 1)}  # fmt: skip
        dim_in = dim
    state = {}
    for name, (dim, before, k) in shapes.items():
        state[f"{name}.conv.weight"] = waves((dim, before, k, k), (2 / before / k**2) ** 0.5)
        state[f"{name}.bn.weight"] = 1 + waves((dim,), 0.3)
        state[f"{name}.bn.bias"] = waves((dim,), 0.1)
        state[f"{name}.bn.running_mean"] = waves((dim,), 0.2)
        state[f"{name}.bn.running_var"] = 1 + waves((dim,), 0.4)
    state["layer1.conv1.conv.weight"] /= 60
    for i in range(4):
        state[f"aspp.c{i}.weight"] = waves((classes, 2048, 3, 3), 0.02)
        state[f"aspp.c{i}.bias"] = waves((classes,), 0.1)
    return state


# Every second row and third column of what DeepLabV2(3, [1, 1, 1, 1], [6, 12, 18, 24]) of kazuto1011/deeplab-pytorch
# gives for the weights of `port_state`.
PORT = (
    (1.44284, -0.64164, 0.69950, -1.59167, 0.20272, 0.74375, -2.41905, -0.86110, 0.12307, 0.24142,
     -1.35958, -1.10708, -2.01215, -1.17891, -2.22227, -0.98387, -2.10923, -3.42292, -2.03429, -1.31368),
    (0.68174, 0.48601, 1.82354, 0.31944, 4.35353, 3.55339, 2.59983, 2.86143, 2.39198, 3.56317,
     1.78830, 3.11253, 2.06926, 3.81418, 1.02646, -0.68120, 2.70867, 3.16676, 2.41167, 3.75409),
    (2.51174, 1.38366, 1.64778, 3.11500, 3.62935, 3.04360, 3.47301, 3.22752, 2.85576, 3.41130,
     1.80368, 2.29959, 2.87231, 3.72128, 3.18985, 3.19525, 2.60886, 1.06187, 2.91877, 2.51324),
)  # fmt: skip


def test_parity_with_the_port():
    """The same weights, on BGR images of 0 to 255 there and RGB of 0 to 1 here; 1e-6 apart when compared directly."""
    trunk = "resnet(depths=(1, 1, 1, 1), stride_in_1x1=True, output_stride=8, ceil_pool=True)"
    model = opsin.create("deeplab", backbone=trunk, num_classes=3, rates=(6, 12, 18, 24)).eval()
    missing, unexpected = model.load_state_dict(remap(port_state(3)), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    row, column = torch.meshgrid(torch.arange(75.0), torch.arange(90.0), indexing="ij")
    waves_of = [(row * a + column * b).sin() for a, b in ((0.2, 0.1), (0.05, 0.3), (0.11, -0.07))]
    image = torch.stack(waves_of)[None] / 2 + 0.5
    with torch.no_grad():
        (scores,) = model.score_maps(image)
    assert scores.shape == (1, 3, 10, 12)
    torch.testing.assert_close(scores[0, :, ::2, ::3].flatten(1), torch.tensor(PORT), atol=1e-4, rtol=1e-4)


def test_our_own_weights_pass_the_renaming():
    state = DeepLab(SMALL, 3).state_dict()
    assert remap(state).keys() == state.keys()


def test_scales_are_fused_by_their_maximum_and_each_has_a_loss():
    model = DeepLab(SMALL, 4, scales=(1.0, 0.5)).eval()
    image, targets = torch.rand(2, 3, 65, 81), torch.randint(0, 4, (2, 65, 81))
    targets[:, :9] = IGNORE
    with torch.no_grad():
        fine, coarse, fused = model.score_maps(image)
        assert fine.shape[-2:] == (9, 11) and coarse.shape[-2:] == (5, 6)
        grown = F.interpolate(coarse, (9, 11), mode="bilinear")
        assert torch.equal(fused, torch.maximum(fine, grown))
        assert (fused == grown).any() and (fused == fine).any()
        losses = model(image, targets)
        assert list(losses) == ["scale 1", "scale 0.5", "max"]
        for loss, scores in zip(losses.values(), (fine, coarse, fused)):
            assert loss == pixel_cross_entropy(scores, shrink_labels(targets, scores.shape[-2:]))
        expected = F.interpolate(fused, (65, 81), mode="bilinear")
        assert torch.equal(model(image).logits, expected)


def test_shrinking_invents_no_label():
    labels = torch.full((1, 64, 64), 2)
    labels[:, :, 32:] = IGNORE
    labels[:, 40:] = 7
    small = shrink_labels(labels, (8, 8))
    assert set(small.unique().tolist()) == {2, 7, IGNORE}
    assert small[0, 0].tolist() == [2] * 4 + [IGNORE] * 4


def test_frozen_norms_stay_frozen():
    model = DeepLab(SMALL, 3, freeze_bn=True).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    sum(model(torch.rand(2, 3, 33, 33), torch.zeros(2, 33, 33).long()).values()).backward()
    after = model.state_dict()
    assert before and all(torch.equal(before[name], after[name]) for name in before)
    assert model.aspp.training
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(not p.requires_grad for m in norms for p in m.parameters())
    plain = DeepLab(SMALL, 3).train()
    freeze_batch_norms(plain)
    assert not any(m.training for m in plain.modules() if isinstance(m, nn.BatchNorm2d))


def test_parameter_groups_and_the_poly_schedule():
    model = DeepLab(SMALL, 3)
    groups = parameter_groups(model, 1e-3)
    assert [group["lr"] for group in groups] == pytest.approx([1e-3, 1e-2, 2e-2])
    assert [group["weight_decay"] for group in groups] == [5e-4, 5e-4, 0]
    counted = [p for group in groups for p in group["params"]]
    assert len(counted) == len(list(model.parameters())) == len({id(p) for p in counted})
    assert {id(p) for p in groups[2]["params"]} == {id(conv.bias) for conv in model.aspp.children()}
    optimizer, schedule = published_optimizer(model, steps=10, lr=1e-3)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1e-2 * (1 - i / 10) ** 0.9 for i in range(11)])


@pytest.mark.parametrize(
    "spec",
    ["convnext(depths=(1, 1, 1), dims=(4, 6, 8), patch_size=2)",
     "vgg(depths=(1, 1, 1, 1, 1), hidden=0, output_stride=8)",
     "swin(dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)"],
)  # fmt: skip
def test_on_other_backbones(spec):
    model = DeepLab(spec, 5, rates=(1, 2), in_chans=1).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, 64, 72)).logits.shape == (1, 5, 64, 72)
    finer = DeepLab(spec, 5, level=0, in_chans=1)
    assert finer.aspp.c0.in_channels == finer.backbone.feature_info[0].channels


def test_what_cannot_be_built_is_told():
    with pytest.raises(BadInput, match="first must be 1"):
        DeepLab(SMALL, scales=(0.5, 1.0))
    with pytest.raises(BadInput, match="Conv2d has none"):
        DeepLab(nn.Conv2d(3, 3, 1))


def test_prediction_with_the_crf_is_the_test_procedure():
    model = DeepLab(SMALL, 3)
    images = torch.rand(2, 3, 40, 33)
    crf = DenseCRF(s_b=20.0, iterations=3)
    masks = model.predict_with_crf(images, crf)
    with torch.no_grad():
        expected = crf(model.eval()(images).logits[1], images[1])
    torch.testing.assert_close(masks.logits[1].exp(), expected)
    assert masks.labels.shape == (2, 40, 33)


def test_colours_are_centred_as_published():
    model = DeepLab(SMALL, 3)
    flat = torch.tensor(MEAN)[:, None, None].expand(1, 3, 8, 8)
    assert model.normalize(flat).abs().max() < 1e-6
