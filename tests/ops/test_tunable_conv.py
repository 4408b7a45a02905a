"""Tunable convolution: the mixture of kernels, controls per sample, folding, and whole networks that are turned."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.deploy import fuse
from opsin.errors import BadInput, UnknownName
from opsin.measure.cost import count_macs
from opsin.ops.conv.tunable_conv import (
    TunableConv,
    TunableConv2d,
    TunableLinear,
    controlled,
    make_tunable,
    set_control,
)

# The authors' layer (mindspore-lab/mindediting, its PyTorch port), "mlp" mode with two kernels, all parameters, input
# and the two controls below filled by `wave`; run beside this one.
OFFICIAL = [
    -1.704512, -1.730056, 0.778883, 4.404697, 6.613410, 4.992165, -1.945764, -2.056828, 0.464508, 4.129993, 6.379896,
    4.825411, 4.563003, 3.228165, 0.697619, -2.680601, -4.435396, -1.607409, 4.788060, 3.548580, 0.959069, -2.518786,
    -4.359087, -1.575660,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def test_numbers_of_the_official_layer():
    layer = TunableConv2d(2, 2, 3, padding=1, phi="affine")
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias, layer.phi.weight, layer.phi.bias):
            parameter.copy_(wave(*parameter.shape))
    y = layer(wave(2, 2, 2, 3, step=0.3), torch.tensor([[1.0, 0.0], [0.25, 0.75]]))
    assert torch.allclose(y.flatten(), torch.tensor(OFFICIAL), atol=1e-5)


@pytest.mark.parametrize("phi", ["mlp", "affine", "identity"])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_are_mixed_per_sample(phi, groups):
    layer = TunableConv2d(4, 6, 3, stride=2, padding=1, groups=groups, controls=3, phi=phi)
    x, w = torch.randn(5, 4, 9, 7), torch.rand(5, 3)
    a = layer.phi(w)
    for y in (layer(x, w), layer.reference(x, w)):
        for i in range(5):
            kernel = torch.einsum("k,kocij->ocij", a[i], layer.weight)
            expected = F.conv2d(x[i : i + 1], kernel, a[i] @ layer.bias, 2, 1, groups=groups)
            assert torch.allclose(y[i : i + 1], expected, atol=1e-5)
    assert (a == w).all() == (phi == "identity")


@pytest.mark.parametrize("bias", [True, False])
def test_one_control_for_all_is_the_same_row_for_each(bias):
    layer, x, w = TunableConv2d(4, 6, 3, padding=1, bias=bias), torch.randn(3, 4, 8, 8), torch.rand(2)
    assert torch.allclose(layer(x, w), layer(x, w.expand(3, 2)), atol=1e-6)
    layer.control = w
    assert torch.allclose(layer(x), layer.reference(x, w), atol=1e-5)
    folded = layer.fuse()
    assert type(folded) is nn.Conv2d and torch.allclose(folded(x), layer(x), atol=1e-5)


def test_turning_changes_what_it_computes_and_gradients_reach_the_control():
    layer, x = TunableConv(4), torch.randn(2, 4, 8, 8)
    w = torch.tensor([0.3, 0.7], requires_grad=True)
    layer(x, w).square().sum().backward()
    assert w.grad is not None and w.grad.abs().min() > 0
    assert (layer(x, torch.tensor([1.0, 0.0])) - layer(x, torch.tensor([0.0, 1.0]))).abs().max() > 1e-3


def test_mixing_costs_nothing_that_grows_with_the_image():
    for side in (8, 32):
        x = torch.randn(1, 8, side, side)
        extra = count_macs(TunableConv(8, controls=4), x) - count_macs(nn.Conv2d(8, 8, 3, padding=1), x)
        assert extra == 4 * (8 * 8 * 9 + 8) + 2 * 4 * 16


@torch.no_grad()
@pytest.mark.parametrize(("phi", "kernels"), [("mlp", 2), ("affine", 2), ("mlp", 6)])
def test_a_fresh_layer_is_as_loud_as_a_plain_one(phi, kernels):
    x = torch.randn(8, 64, 12, 12)
    plain = nn.Conv2d(64, 64, 3)(x).std()
    layer = TunableConv2d(64, 64, 3, kernels=kernels, phi=phi)
    assert float(layer(x, torch.rand(8, 2)).std() / plain) == pytest.approx(1, abs=0.35)
    a = layer.phi(torch.rand(200, 2))
    assert float(a.mean()) * kernels == pytest.approx(1, abs=0.5)
    nn.init.normal_(layer.weight, std=0.01)  # the authors' code starts coefficients and kernels near zero
    last = layer.phi if phi == "affine" else layer.phi[2]
    nn.init.normal_(last.weight, std=0.01)
    nn.init.zeros_(last.bias)
    assert float(layer(x, torch.rand(8, 2)).std() / plain) < 0.1


def test_a_network_made_tunable_starts_as_it_was():
    net = opsin.create("resnet18", num_classes=3).eval()
    x = torch.randn(2, 3, 33, 33)
    tunable = make_tunable(net, controls=2, linear=True)
    assert not any(type(m) in (nn.Conv2d, nn.Linear) for m in tunable.modules() if not _inside_phi(tunable, m))
    for layer in tunable.modules():
        if isinstance(layer, (TunableConv2d, TunableLinear)):
            last = layer.phi[2]
            nn.init.zeros_(last.weight)  # coefficients exactly 1/K
            assert (layer.weight[0] - layer.weight[1]).abs().max() > 1e-3, "equal kernels would stay equal"
    with torch.no_grad():
        assert torch.allclose(tunable(x), net(x), atol=1e-4)


def _inside_phi(net: nn.Module, module: nn.Module) -> bool:
    return any(m is module for name, part in net.named_modules() if name.endswith("phi") for m in part.modules())


@torch.no_grad()
def test_a_whole_network_is_turned_and_folded():
    net = make_tunable(opsin.create("metanet_n", num_classes=3)).eval()
    x = torch.randn(3, 3, 16, 16)
    ends = torch.eye(2)
    set_control(net, ends[0])
    first = net(x)
    with controlled(net, [0.0, 1.0]) as turned:
        second = turned(x)
        assert (first - second).abs().max() > 1e-4
    assert torch.equal(net(x), first), "the control is back"
    with controlled(net, ends[[0, 1, 0]]):
        each = net(x)
    assert torch.allclose(each, torch.stack((first[0], second[1], first[2])), atol=1e-5)
    plain = fuse(net)
    assert not any(isinstance(m, TunableConv2d) for m in plain.modules())
    assert torch.allclose(plain(x), first, atol=1e-4)


def test_the_control_comes_back_after_an_error():
    layer = TunableConv(4)
    with pytest.raises(RuntimeError), controlled(layer, [0.5, 0.5]):
        raise RuntimeError
    assert layer.control.tolist() == [1, 1]
    assert "control" not in layer.state_dict()


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 5), (4, 2, 3, 5)])
def test_linear_layers_follow_the_same_rule(shape):
    layer, x, w = TunableLinear(5, 7), torch.randn(shape), torch.rand(4, 2)
    y, a = layer(x, w), layer.phi(w)
    for i in range(4):
        expected = F.linear(x[i], torch.einsum("k,koc->oc", a[i], layer.weight), a[i] @ layer.bias)
        assert torch.allclose(y[i], expected, atol=1e-5)
    layer.control = w[0]
    assert torch.allclose(layer.fuse()(x), layer(x), atol=1e-5)


def test_training_tells_the_kernels_apart():
    torch.manual_seed(0)
    layer, x = TunableConv(4, kernel_size=1), torch.randn(16, 4, 6, 6)
    optimiser = torch.optim.Adam(layer.parameters(), 0.03)
    for _ in range(150):
        w = torch.rand(16, 2)
        optimiser.zero_grad()
        target = w[:, 0, None, None, None] * x - w[:, 1, None, None, None] * x.flip(1)
        (layer(x, w) - target).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        assert (layer(x, torch.tensor([1.0, 0.0])) - x).square().mean() < 0.1
        assert (layer(x, torch.tensor([0.0, 1.0])) + x.flip(1)).square().mean() < 0.1


def test_complaints_are_sentences():
    layer, x = TunableConv(4), torch.randn(3, 4, 6, 6)
    with pytest.raises(BadInput, match=r"shape \(3,\) does not fit"):
        layer(x, torch.rand(3))
    with pytest.raises(BadInput, match=r"\(3, 2\) for each"):
        layer(x, torch.rand(2, 2))
    with pytest.raises(BadInput, match="kernel_size=2 is even"):
        TunableConv(4, kernel_size=2)
    with pytest.raises(BadInput, match="identity"):
        TunableConv(4, phi="identity", kernels=3)
    with pytest.raises(UnknownName, match="affine"):
        TunableConv(4, phi="afine")
    with pytest.raises(BadInput, match="controls=0"):
        TunableConv(4, controls=0)
    with pytest.raises(BadInput, match="no tunable layer"):
        set_control(nn.Conv2d(1, 1, 1), [1.0, 1.0])
    with pytest.raises(BadInput, match="layers with 2 controls"):
        set_control(layer, [1.0, 1.0, 1.0])
    with pytest.raises(BadInput, match="no convolution"):
        make_tunable(nn.Linear(2, 2))
    set_control(layer, torch.rand(3, 2))
    with pytest.raises(BadInput, match="differs between samples"):
        copy.deepcopy(layer).fuse()


def test_a_bank_of_one_kernel_with_one_number_is_the_layer_itself():
    layer = nn.Conv2d(3, 1, 3)
    x = torch.randn(2, 3, 8, 8)
    tunable = make_tunable(nn.Sequential(layer), controls=1)
    tunable[0].control.fill_(1.0)
    assert torch.isfinite(tunable(x)).all() and torch.equal(tunable[0].bias[0], layer.bias)
