"""TrAct: the official gradients, the least squares that they solve, and hooks that leave no trace."""

import warnings
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.layers import tract as module
from opsin.layers.tract import (
    FirstLayerHook,
    TrActConv2d,
    TrActHook,
    TrActLinear,
    by_covariance,
    by_woodbury,
    first_layer,
    least_squares,
    rows,
    tract,
)  # fmt: skip

# torch_tract 0.1.0: TrAct(Linear(5, 2)) and TrAct(Conv2d(2, 2, 2, stride=2, padding=1)), lambda 0.1, weights and inputs
# filled by `wave`, loss = (y * wave(y)).sum(): gradients of the weights.
LINEAR_7_ROWS = [
    -0.243548, -0.083766, 0.13941, 0.25709, 0.180206, -0.375863, 0.059577, 0.449932, 0.499794, 0.171417,
]  # fmt: skip
LINEAR_3_ROWS = [
    -0.139865,
    -0.671764,
    -0.695286,
    -0.192629,
    0.455804,
    -0.290753,
    -0.650954,
    -0.518528,
    0.006311,
    0.52637,
]
CONV = [
    -2.867211,
    -3.27447,
    6.967643,
    -0.145563,
    2.988568,
    -4.625475,
    0.114132,
    6.817981,
    4.174901,
    4.283932,
    -5.987523,
    0.219232,
    -3.96405,
    5.745921,
    0.009683,
    -5.596534,
]
LAYERS = [
    (nn.Linear(6, 3), (20, 6)), (nn.Linear(6, 3), (4, 6)), (nn.Linear(6, 3), (2, 5, 6)),
    (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 9)), (nn.Conv2d(4, 6, 3, 2, 1, 2, groups=2), (3, 4, 9, 8)),
    (nn.Conv2d(3, 4, (1, 3), padding="same", padding_mode="reflect"), (2, 3, 5, 6)),
    (nn.Conv2d(8, 4, 4), (1, 8, 5, 5)), (nn.Conv3d(2, 3, 2, stride=2), (3, 2, 4, 4, 6)),
]  # fmt: skip
NAMES = [f"{type(layer).__name__} on {'x'.join(map(str, shape))}" for layer, shape in LAYERS]


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def gradients(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weight, the bias and the input, for a fixed loss."""
    x = x.clone().requires_grad_()
    y = layer(x)
    wanted = (layer.weight, layer.bias, x)
    return torch.autograd.grad((y * wave(*y.shape, step=0.3).to(y)).sum(), wanted)


@pytest.mark.parametrize(("count", "expected"), [(7, LINEAR_7_ROWS), (3, LINEAR_3_ROWS)])
def test_numbers_of_the_official_linear_layer(count, expected):
    layer = nn.Linear(5, 2)
    with torch.no_grad():
        layer.weight.copy_(wave(2, 5))
    grad = gradients(tract(layer), wave(count, 5, step=0.9))[0]
    assert torch.allclose(grad.flatten(), torch.tensor(expected), atol=1e-5)


def test_numbers_of_the_official_convolution():
    layer = nn.Conv2d(2, 2, 2, 2, 1)
    with torch.no_grad():
        layer.weight.copy_(wave(2, 2, 2, 2))
    grad = gradients(tract(layer), wave(3, 2, 4, 4, step=0.9))[0]
    assert torch.allclose(grad.flatten(), torch.tensor(CONV), atol=1e-5)


@pytest.mark.parametrize("count", [5, 8, 30])
def test_both_formulas_agree_and_are_the_ridge_minimiser(count):
    g, x = torch.randn(count, 4, dtype=torch.float64), torch.randn(count, 8, dtype=torch.float64)
    grad, lam = (g.T @ x)[None], 0.1
    left, right = by_covariance(grad, (x.T @ x / count)[None], lam)[0], by_woodbury(grad, x[None], lam)[0]
    assert (left - right).abs().max() < 1e-8
    assert torch.equal(least_squares(grad, x[None], lam)[0], left if count >= 8 else right)
    # the least of (1/b) |X D^T - b G|^2 + lambda |D|^2, as one least-squares problem without normal equations
    tall = torch.cat((x / count**0.5, lam**0.5 * torch.eye(8, dtype=torch.float64)))
    goal = torch.cat((count**0.5 * g, torch.zeros(8, 4, dtype=torch.float64)))
    assert (torch.linalg.lstsq(tall, goal).solution.T - left).abs().max() < 1e-8


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=NAMES)
def test_layers_of_every_kind(layer, shape):
    layer, x = deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)
    plain, bias, inputs = gradients(layer, x)
    groups = getattr(layer, "groups", 1)
    patches = rows(layer, x)
    weight = layer.weight.flatten(1).unflatten(0, (groups, -1))
    outputs = (patches @ weight.mT).movedim(0, 1).flatten(1) + layer.bias  # positions, channels
    axis = -1 if isinstance(layer, nn.Linear) else 1
    assert torch.allclose(outputs, layer(x).movedim(axis, -1).flatten(0, -2)), "rows are what the outputs come from"
    expected = []
    for part, rows_ in zip(plain.flatten(1).unflatten(0, (groups, -1)), patches):
        damped = rows_.T @ rows_ / len(rows_) + 0.1 * torch.eye(rows_.shape[1]).double()
        expected.append(part @ damped.inverse())
    ours = gradients(tract(layer), x)
    assert torch.allclose(ours[0].flatten(1), torch.cat(expected), rtol=1e-6, atol=1e-8)
    assert torch.equal(ours[1], bias) and torch.equal(ours[2], inputs), "bias and input have their ordinary gradients"
    hook = TrActHook(layer)
    assert torch.allclose(gradients(layer, x)[0], ours[0])
    hook.remove()
    assert torch.equal(gradients(layer, x)[0], plain)


def test_patches_in_parts(monkeypatch):
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(7, 3, 6, 6)
    expected = gradients(tract(layer), x)[0]
    monkeypatch.setattr(module, "CHUNK", 3 * 9 * 36 * 2)  # two images
    assert torch.allclose(gradients(tract(layer), x)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_large_lambda_is_the_plain_gradient_over_lambda():
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    assert torch.allclose(1e5 * gradients(tract(layer, 1e5), x)[0], gradients(layer, x)[0], rtol=1e-2, atol=1e-2)


def test_contrast_hardly_changes_the_step_of_the_outputs():
    layer = nn.Linear(4, 3)
    x = torch.randn(50, 4)

    def step(inputs: Tensor, layer: nn.Module) -> Tensor:
        return inputs @ gradients(layer, inputs)[0].T

    ours = step(4 * x, tract(layer, 1e-3)).norm() / step(x, tract(layer, 1e-3)).norm()
    plain = step(4 * x, layer).norm() / step(x, layer).norm()
    assert 0.95 < ours < 1.05 and abs(plain - 16) < 0.1


def test_a_drop_in_layer_shares_parameters_and_names():
    for layer, kind in ((nn.Linear(3, 2), TrActLinear), (nn.Conv2d(3, 2, 3, bias=False), TrActConv2d)):
        new = tract(layer, 0.2)
        assert type(new) is kind and new.weight is layer.weight and new.bias is layer.bias and new.lam == 0.2
        assert list(new.state_dict()) == list(layer.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(new(x), layer(x)) and torch.equal(new.eval()(x), layer(x))
    program = torch.export.export(new, (x,)).module()
    assert torch.equal(program(x), layer(x))


def test_inference_and_evaluation_keep_nothing():
    layer, x = nn.Linear(4, 2), torch.randn(3, 4)
    hook = TrActHook(layer)
    with torch.no_grad():
        layer(x)
    layer.eval()(x)
    assert not hook.inputs
    assert torch.equal(gradients(layer, x)[0], gradients(deepcopy(layer), x)[0]), "evaluation has plain gradients"


def test_a_layer_that_is_applied_twice_solves_for_both():
    layer, x = nn.Linear(4, 2), torch.randn(10, 4)
    TrActHook(layer)
    both = torch.cat([layer(x[:6]), layer(x[6:])])
    twice = torch.autograd.grad((both * wave(10, 2, step=0.3)).sum(), layer.weight)[0]
    assert torch.allclose(twice, gradients(tract(nn.Linear(4, 2)), x)[0], atol=1e-5)


class Crossed(nn.Module):
    """Its layers are not written down in the order in which they are applied."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.stem = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean((2, 3)))


def test_the_first_layer_is_the_one_that_is_applied_first():
    net, x = Crossed(), torch.randn(2, 3, 6, 6)
    assert first_layer(net, x) == "stem.1"
    names = list(net.state_dict())
    hook = FirstLayerHook(net)
    net(x).sum().backward()
    assert hook.hook.layer is net.stem[1] and list(net.state_dict()) == names
    plain = deepcopy(net)
    hook.remove()
    for other in (plain, net):
        other.zero_grad()
        other(x).sum().backward()
    assert torch.equal(net.stem[1].weight.grad, plain.stem[1].weight.grad), "no trace is left"
    for name, expected in (("vit_tiny_patch16_224", "patch_embed.proj"), ("resnet18", "conv1")):
        assert first_layer(opsin.create(name), torch.randn(1, 3, 224, 224)) == expected


def test_both_ways_train_the_same_network():
    x, y = torch.randn(16, 3, 6, 6), torch.randint(2, (16,))
    ends = []
    for drop_in in (True, False):
        torch.manual_seed(0)
        net = Crossed()
        if drop_in:
            net.stem[1] = tract(net.stem[1])
        else:
            FirstLayerHook(net)
        optimiser = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimiser.step()
        ends.append(net.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ends[0].values(), ends[1].values()))


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="not for BatchNorm2d"):
        tract(nn.BatchNorm2d(3))
    with pytest.raises(BadInput, match="must be above 0"):
        TrActHook(nn.Linear(2, 2), 0.0)
    for call in (lambda: FirstLayerHook(nn.ReLU()), lambda: first_layer(nn.ReLU(), torch.ones(1))):
        with pytest.raises(BadInput, match="this network has none"):
            call()


def frozen() -> nn.Module:
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.requires_grad_(False)
    return layer


class Doubled(nn.Conv2d):
    """Computes something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_layers_whose_weight_does_not_learn_by_itself():
    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(BadInput, match="Conv2d is frozen"):
        TrActHook(frozen())
    FirstLayerHook(net := nn.Sequential(frozen()))
    with pytest.raises(BadInput, match="Conv2d is frozen"):
        net(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    for layer in (old, nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))):
        for call in (tract, TrActHook):
            with pytest.raises(BadInput, match="computed from other tensors"):
                call(layer)


def test_a_forward_of_its_own_is_not_replaced():
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: x
    for own in (layer, Doubled(3, 4, 3)):
        with pytest.raises(BadInput, match="a forward of its own"):
            tract(own)
    again = tract(tract(nn.Conv2d(3, 4, 3)), 0.2)
    assert type(again) is TrActConv2d and again.lam == 0.2
    assert type(tract(nn.Conv2d(3, 4, 3))) is type(tract(type("Named", (nn.Conv2d,), {})(3, 4, 3)))


def test_forwards_without_a_backward_leave_no_trace():
    layer, x = nn.Linear(4, 2), torch.randn(10, 4)
    expected = gradients(tract(layer), x)[0]
    hook = TrActHook(layer)
    for _ in range(5):
        layer(3 * x)
    assert not hook.inputs
    assert torch.equal(gradients(layer, x)[0], expected)
    other = (3 * x).requires_grad_()
    torch.autograd.grad(layer(other).sum(), other)  # a backward pass that stops at the input
    assert torch.equal(gradients(layer, x)[0], expected) and not hook.inputs
    torch.autograd.grad(layer(other).sum(), other)
    plain = gradients(nn.Linear(4, 2), x)[0]
    assert torch.equal(gradients(layer.eval(), x)[0], plain), "evaluation has plain gradients, whatever went before"


def test_no_images_are_a_batch():
    for layer, shape in ((nn.Conv2d(3, 4, 3), (0, 3, 6, 6)), (nn.Linear(4, 2), (0, 4))):
        assert not gradients(tract(layer), torch.empty(shape))[0].any()
        TrActHook(layer)
        assert not gradients(layer, torch.empty(shape))[0].any()


def test_the_recommended_penalties():
    assert opsin.create("tract").lam == 0.1 and tract(nn.Linear(2, 2)).lam == TrActHook(nn.Linear(2, 2)).lam == 0.1
    assert opsin.create("tract_l0_05").lam == 0.05 and opsin.create("tract_l0_2").lam == 0.2
    recipe, net, x = opsin.create("tract_l0_05"), nn.Sequential(nn.Linear(4, 2)), torch.randn(10, 4)
    expected = gradients(tract(net[0], 0.05), x)[0]
    recipe.on_fit_start(None, net)
    net(x)
    assert torch.equal(gradients(net[0], x)[0], expected)
