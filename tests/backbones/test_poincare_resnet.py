"""Poincare ResNet: its published shapes, what it is made of, and that depth does not silence it."""

import pytest
import torch

import opsin
from opsin.backbones.poincare_resnet import PoincareBlock, PoincareResNet
from opsin.layers.poincare import LearnedCurvature, exp0, log0, mobius_add
from opsin.layers.poincare_layers import FrechetBatchNorm2d, PoincareBatchNorm2d, PoincareLinear
from opsin.ops.conv.poincare_conv import PoincareConv2d


@pytest.mark.parametrize(
    ("name", "layers", "dims"),
    [
        ("poincare_resnet20_8_16_32", 20, (8, 16, 32)), ("poincare_resnet32_8_16_32", 32, (8, 16, 32)),
        ("poincare_resnet20_4_8_16", 20, (4, 8, 16)),
    ],
)  # fmt: skip
def test_published_shapes(name, layers, dims):
    with torch.device("meta"):
        net = opsin.create(name)
    convs = [m for m in net.modules() if isinstance(m, PoincareConv2d)]
    wide = [c for c in convs if c.kernel_size == 3]
    assert len(wide) + 1 == layers and len(convs) - len(wide) == 2
    assert tuple(info.channels for info in net.feature_info) == dims and net.fc.weight.shape == (10, dims[-1])
    norms = [m for m in net.modules() if isinstance(m, PoincareBatchNorm2d)]
    assert len(norms) == len(wide) and all(norm.scale.ndim == 0 for norm in norms)


def test_the_shortcut_is_mobius_addition_of_branch_and_input():
    block, x = PoincareBlock(4, 4, 1, 0.1, PoincareBatchNorm2d, "identity").eval(), torch.randn(2, 4, 5, 5)
    branch = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
    expected = log0(mobius_add(exp0(branch, 0.1, 1), exp0(x, 0.1, 1), 0.1, 1), 0.1, 1).relu()
    assert torch.allclose(block(x), expected, atol=1e-5)


@torch.no_grad()
def test_before_training_vectors_keep_their_length_with_the_identity_only():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    kept = {}
    for init in ("identity", "gaussian"):
        net = PoincareResNet(dims=(16, 16, 16), init=init).eval()
        kept[init] = float(net.features(x)[-1].norm(dim=1).mean() / x.norm(dim=1).mean())
    assert 0.5 < kept["identity"] < 2 and kept["gaussian"] < 0.1


def test_options_reach_every_layer():
    curvature = LearnedCurvature(0.2)
    net = PoincareResNet((1, 1, 1), (4, 6, 8), curvature=curvature, norm=FrechetBatchNorm2d)
    assert sum(isinstance(m, FrechetBatchNorm2d) for m in net.modules()) == 7
    layers = [m for m in net.modules() if isinstance(m, PoincareConv2d | PoincareBatchNorm2d | PoincareLinear)]
    assert all(layer.curvature is curvature for layer in layers)
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert curvature.free.grad.isfinite() and curvature.free.grad != 0
