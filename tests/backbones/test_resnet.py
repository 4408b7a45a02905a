"""ResNet's strides and dilations, its shortcuts, and PyramidNet's widths."""

import pytest
import torch
from torch import nn

import opsin
from opsin.errors import BadInput


def dilations(model: nn.Module, stage: str) -> set[tuple[int, int]]:
    return {m.dilation for m in getattr(model, stage).modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)}


def test_output_stride_dilates_every_block_of_a_stage():
    model = opsin.create("resnet50", output_stride=8, num_classes=0).eval()
    assert [info.stride for info in model.feature_info] == [4, 8, 8, 8]
    assert dilations(model, "layer2") == {(1, 1)}
    assert dilations(model, "layer3") == {(2, 2)} and dilations(model, "layer4") == {(4, 4)}
    assert model.features(torch.randn(1, 3, 64, 64))[-1].shape[2:] == (8, 8)


@pytest.mark.parametrize(("pixels", "side"), [(321, 41), (513, 65), (322, 41)])
def test_caffe_trunk_of_deeplab(pixels, side):
    model = opsin.create(
        "resnet", depths=(1, 1, 1, 1), dims=(4, 4, 4, 4), stride_in_1x1=True, output_stride=8, ceil_pool=True
    )
    strides = [(b.conv1.stride[0], b.conv2.stride[0]) for s in (model.layer2, model.layer3) for b in s]
    assert strides == [(2, 1), (1, 1)]
    assert model.features(torch.randn(1, 3, pixels, 8))[-1].shape[2] == side


def test_version_1_5_strides_in_the_3x3():
    block = opsin.create("resnet50").layer2[0]
    assert block.conv1.stride == (1, 1) and block.conv2.stride == (2, 2) and block.downsample[0].stride == (2, 2)


def test_impossible_output_stride_is_named():
    with pytest.raises(BadInput, match="output_stride=6"):
        opsin.create("resnet18", output_stride=6)


def test_cifar_shortcut_is_free():
    model = opsin.create("resnet20_cifar").eval()
    assert not any("downsample" in name for name in model.state_dict())
    x = torch.randn(1, 16, 4, 4)
    y = model.layer2[0].downsample(x)
    assert y.shape == (1, 32, 2, 2)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert [m.shape[1:] for m in model.features(torch.randn(1, 3, 32, 32))] == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_every_relu_is_a_module_of_its_own():
    model = opsin.create("resnet18").eval()
    calls: list[int] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, _i, _o: calls.append(id(m)))
    model(torch.randn(1, 3, 32, 32))
    assert len(calls) == len(set(calls)) == 17


def test_pyramid_widths_grow_by_the_same_step():
    model = opsin.create("pyramidnet200_a240")
    widths = [b.conv1.out_channels for i in (1, 2, 3) for b in getattr(model, f"layer{i}")]
    assert len(widths) == 66 and widths[-1] == 256
    assert widths == [round(16 + 240 * (k + 1) / 66) for k in range(66)]
    assert not any(isinstance(m, nn.ReLU) for m in list(model.layer1[0].children())[-2:]), "no activation after the sum"
