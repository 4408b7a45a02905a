"""Fake quantisation: levels, ranges, straight-through gradients, and a network whose layers use it."""

import copy

import pytest
import torch
from torch import nn

from opsin.layers.fake_quant import (
    ActivationQuantiser,
    WeightQuantiser,
    fake_quantise,
    fake_quantised,
    percentile_range,
    straight_through,
)


def test_weights_take_sixteen_values_per_channel_and_zero_stays_zero():
    weight = torch.randn(5, 400)
    weight[:, 0] = 0
    low = WeightQuantiser(4, percent=0)(weight)
    assert all(len(row.unique()) <= 16 for row in low) and (low[:, 0] == 0).all()
    step = (weight.amax(1) - weight.amin(1)) / 15
    assert ((low - weight).abs().amax(1) <= step * 1.0001).all()
    assert ((low - weight).abs().mean(1) < step * 0.27).all(), "rounding to the nearest errs by a quarter of a step"


def test_the_lower_half_of_the_levels_is_kept():
    """The official code clips signed codes to 0 ... 15, which loses every weight below the middle of the range."""
    weight = torch.linspace(-1, 1, 100)[None]
    ours = WeightQuantiser(4, percent=0)(weight)
    scale, zero = torch.tensor(7.5), torch.round(torch.tensor(-7.5)) + 8
    official = (torch.clamp(torch.round(scale * weight - zero), 0, 15) + zero) / scale
    assert (ours - weight).abs().max() < 0.14 and (official - weight).abs().max() > 0.9


def test_percentiles_leave_outliers_out():
    weight = torch.arange(1001.0).repeat(2, 1)
    low, high = percentile_range(weight, 0.1)
    assert low.shape == (2, 1) and torch.allclose(low, torch.tensor(1.0)) and torch.allclose(high, torch.tensor(999.0))
    weight[0, -1] = 1e6
    quantised = WeightQuantiser(4)(weight)
    assert quantised[0].max() < 1001 and torch.equal(quantised[0, :-1], quantised[1, :-1])


def test_gradients_pass_straight_through():
    x = torch.tensor([-2.6, 0.4, 3.3], requires_grad=True)
    y = straight_through(x, torch.round)
    assert torch.equal(y, torch.tensor([-3.0, 0.0, 3.0])), "exactly"
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_activations_move_their_range_in_training_only():
    quantiser, x = ActivationQuantiser(8, momentum=0.9), torch.rand(1000) * 5 - 1
    quantiser.eval()
    assert torch.equal(quantiser(x), x), "nothing seen yet"
    quantiser.train()
    y = quantiser(x)
    assert torch.allclose(quantiser.low, x.min()) and torch.allclose(quantiser.high, x.max())
    assert torch.equal(y, fake_quantise(x, x.min(), x.max(), 8)) and 0 < (y - x).abs().max() < 0.011
    quantiser(2 * x)
    assert torch.allclose(quantiser.high, 1.1 * x.max()) and torch.allclose(quantiser.low, 1.1 * x.min())
    before = quantiser.high.clone()
    out = quantiser.eval()(100 * x)
    assert torch.equal(quantiser.high, before) and out.max() <= before * 1.01, "clipped to the range"


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 40, 3), nn.Flatten())


def test_a_copy_of_a_network_computes_in_low_precision():
    net, x = network(), torch.randn(4, 3, 6, 6)
    low = fake_quantised(net, weight_bits=4, activation_bits=8)
    assert torch.equal(low[3].parametrizations.weight.original, net[3].weight)
    assert all(len(row.unique()) <= 16 for row in low[3].weight.flatten(1)) and len(low[0].weight[0].unique()) > 16
    assert not hasattr(net[3], "input_quantiser"), "the original is as it was"
    y, z = low(x), net(x)
    assert 0 < (y - z).norm() / z.norm() < 0.2
    y.square().sum().backward()
    assert low[3].parametrizations.weight.original.grad.any() and low[0].parametrizations.weight.original.grad.any()
    again = fake_quantised(network())
    again.load_state_dict(copy.deepcopy(low.state_dict()))
    assert torch.equal(again.eval()(x), low.eval()(x))


def test_a_norm_behind_a_layer_needs_no_folding():
    weight, gain = torch.randn(6, 30), torch.rand(6, 1) + 0.5
    quantiser = WeightQuantiser(4)
    assert torch.allclose(quantiser(weight * gain), quantiser(weight) * gain, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_more_bits_err_less(bits):
    weight = torch.randn(4, 999)
    error = (WeightQuantiser(bits, 0)(weight) - weight).abs().mean()
    assert error < 1.1 * (weight.amax() - weight.amin()) / (2**bits - 1) / 4
