"""ZeroQ: the quantiser, the distilled statistics, and the frontier."""

from itertools import product

import pytest
import torch
from torch import nn

import opsin
from opsin.compress import Budget
from opsin.compress.bit_allocation import best_within, pareto_frontier, sensitivities
from opsin.compress.distilled_data import distil
from opsin.compress.quantiser import (
    QuantisedLayer,
    channel_range,
    codes_of,
    fake_quantise,
    is_plain,
    pack_codes,
    unpack_codes,
)  # fmt: skip
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize


def network(entrance: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        entrance or nn.Identity(), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    for _ in range(30):
        net(0.4 + 0.2 * torch.randn(32, 3, 16, 16))
    return net.eval()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_quantiser_agrees_with_torch(bits):
    x = torch.randn(1000) * 3 + 1
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    zero = int(torch.round(-low / step)) - 2 ** (bits - 1)
    half = 2 ** (bits - 1)
    expected = torch.fake_quantize_per_tensor_affine(x, float(step), zero, -half, half - 1)
    ours = fake_quantise(x, low, high, bits)
    apart = (ours - expected).abs()
    assert apart.max() <= step * 1.001 and (apart > 1e-4).float().mean() < 0.01
    assert (ours - x).abs().max() <= step and len(ours.unique()) <= 2**bits


def test_every_channel_has_its_own_range():
    weight = torch.stack([torch.linspace(-1, 1, 16), torch.linspace(-100, 100, 16)]).view(2, 16, 1, 1)
    error = (fake_quantise(weight, *channel_range(weight), 4) - weight).abs().flatten(1).max(1).values
    assert error[0] < 0.1 and error[1] < 10


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_pack_exactly(bits):
    codes = torch.randint(0, 2**bits, (37,))
    packed = pack_codes(codes.to(torch.int32), bits)
    assert packed.dtype == torch.uint8 and len(packed) == -(-37 * bits // 8)
    assert torch.equal(unpack_codes(packed, bits)[:37].long(), codes)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), torch.randn(2, 6, 9, 9)),
        (nn.Conv1d(3, 4, 3, dilation=2, bias=False), torch.randn(2, 3, 9)),
        (nn.Linear(5, 7), torch.randn(4, 5)),
    ],
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_quantised_layer_computes_with_its_codes(layer, x, bits):
    weight = layer.weight.detach()
    quantised = QuantisedLayer(layer, bits)
    assert torch.equal(quantised.weight(), fake_quantise(weight, *channel_range(weight), bits))
    layer.weight.data = quantised.weight()
    assert torch.allclose(quantised(x), layer(x), atol=1e-6)
    assert quantised.codes.numel() == -(-weight.numel() * bits // 8)


def test_codes_stay_inside_their_bits():
    codes, _, _ = codes_of(torch.randn(100), torch.tensor(-0.5), torch.tensor(0.5), 4)
    assert codes.min() >= -8 and codes.max() <= 7


@pytest.mark.parametrize("entrance", [None, Normalize((0.4,) * 3, (0.2,) * 3)])
def test_distilled_images_have_the_statistics_that_batch_norms_remember(entrance):
    net = network(entrance)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, losses = distil(net, (4, 3, 16, 16), steps=60)
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()), "the network must not move"
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    seen = {}
    net[2].register_forward_pre_hook(lambda m, i: seen.update(x=i[0]))
    net(x)
    per_image = seen["x"].flatten(2).mean(2)
    assert (per_image - net[2].running_mean).abs().max() < 0.3
    again, _ = distil(net, (4, 3, 16, 16), steps=60)
    assert torch.equal(x, again), "the same seed gives the same images"


def test_images_are_distilled_where_the_network_lies():
    assert distil(network().to("meta"), (4, 3, 16, 16), steps=0)[0].is_meta


def test_networks_without_batch_norms_are_named():
    with pytest.raises(BadInput, match="no batch norms"):
        distil(nn.Sequential(nn.Conv2d(3, 4, 3)), (1, 3, 8, 8), steps=1)


def test_sensitivity_is_the_divergence_of_one_layer_and_leaves_weights_alone():
    net, x = network(), torch.randn(8, 3, 16, 16)
    layers = [net[1], net[4], net[9]]
    before = [layer.weight.clone() for layer in layers]
    omega = sensitivities(net, layers, x, (2, 4, 8))
    assert all(torch.equal(a, layer.weight) for a, layer in zip(before, layers, strict=True))
    reference = net(x).softmax(1)
    net[4].weight.data = fake_quantise(before[1], *channel_range(before[1]), 2)
    moved = net(x).softmax(1)
    expected = (reference * (reference / moved).log()).sum(1).mean()
    assert omega[1, 0] == pytest.approx(float(expected.detach()), rel=1e-3)
    assert (omega[:, 0] > omega[:, 2]).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_frontier_is_that_of_brute_force(seed):
    torch.manual_seed(seed)
    omega, params, choices = torch.rand(6, 3), [7, 13, 40, 5, 100, 11], (2, 4, 8)
    every = {}
    for pick in product(range(3), repeat=6):
        size = sum(p * choices[j] for p, j in zip(params, pick, strict=True))
        cost = sum(float(omega[i, j]) for i, j in enumerate(pick))
        every[size] = min(cost, every.get(size, float("inf")))
    expected, best = [], float("inf")
    for size in sorted(every):
        if every[size] < best - 1e-12:
            expected.append((size, every[size]))
            best = every[size]
    frontier = pareto_frontier(omega, params, choices)
    assert [p.size for p in frontier] == [s for s, _ in expected]
    assert [p.omega for p in frontier] == pytest.approx([c for _, c in expected], abs=1e-6)
    for point in frontier:
        assert sum(p * b for p, b in zip(params, point.bits, strict=True)) == point.size
        cost = sum(float(omega[i, choices.index(b)]) for i, b in enumerate(point.bits))
        assert cost == pytest.approx(point.omega, abs=1e-6)


def test_the_best_within_a_limit():
    frontier = pareto_frontier(torch.tensor([[3.0, 1.0], [5.0, 0.5]]), [10, 10], (2, 4))
    assert best_within(frontier, 60).bits == (2, 4)
    with pytest.raises(BadInput, match="below the smallest"):
        best_within(frontier, 39)


def test_eight_bits_hardly_change_the_answers():
    net, x = network(), 0.4 + 0.2 * torch.randn(64, 3, 16, 16)
    result = opsin.create("zeroq_w8a8", steps=40, input_size=(3, 16, 16))(net)
    assert result.report.after["bits"] == 8
    assert (result.model(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_activations_are_rounded_and_frozen():
    result = opsin.create("zeroq_w8a8", steps=20, input_size=(3, 16, 16), activation_bits=4)(network())
    out = {}
    result.model[3].register_forward_hook(lambda m, i, o: out.update(y=o))
    result.model(10 * torch.randn(4, 3, 16, 16))
    assert len(out["y"].unique()) <= 16


def test_impossible_budgets_and_unknown_sizes_are_named():
    with pytest.raises(BadInput, match="below the smallest"):
        opsin.create("zeroq", steps=5, input_size=(3, 16, 16))(network(), None, Budget(bits=1))
    with pytest.raises(BadInput, match="cannot meet"):
        opsin.create("zeroq", steps=5, input_size=(3, 16, 16))(network(), None, Budget(params=3))
    with pytest.raises(BadInput, match="input_size"):
        opsin.create("zeroq")(network())
    with pytest.raises(BadInput, match="2, 4 or 8"):
        opsin.create("zeroq", choices=(3,))


def test_every_layer_of_a_published_network_is_quantised():
    """MobileNetV2's depthwise convolutions are a class of their own."""
    result = opsin.create("zeroq_w8a8", images=2, steps=1, input_size=(3, 64, 64))(opsin.create("mobilenetv2_100"))
    assert result.report.after["bits"] == 8
    assert result.report.after["bytes"] < 0.28 * result.report.before["bytes"]


def test_layers_that_compute_something_else_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert is_plain(nn.Conv1d(2, 2, 3)) and not is_plain(Doubled(2, 2))
    assert not is_plain(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"))
