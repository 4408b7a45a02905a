"""The slow network: one function at every resolution, the variance of its first kernels, and what it keeps."""

import copy

import pytest
import torch

from opsin.layers.slow_net import SlowNet, grid


def test_coordinates_span_minus_one_to_one():
    x = grid((3, 5)).view(3, 5, 2)
    assert x[:, 0, 0].tolist() == [-1, 0, 1] and x[0, :, 1].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert grid((1,)).tolist() == [[0.0]]


@torch.no_grad()
def test_it_is_the_recursion_of_the_docstring():
    net, x = SlowNet(3, hidden=4, num_layers=2), grid((2, 3))
    filters = [
        torch.sin(x @ w.T + b) for w, b in zip(net.filters.weight.chunk(3), net.filters.bias.chunk(3), strict=True)
    ]
    h = filters[0]
    for linear, wave in zip(net.linears, filters[1:], strict=True):
        h = (h @ linear.weight.T + linear.bias) * wave
    assert torch.allclose(net((2, 3)), net.output(h).T.view(3, 2, 3), atol=1e-6)


@torch.no_grad()
def test_a_finer_grid_samples_the_same_function():
    net = SlowNet(4)
    assert torch.allclose(net((17, 9))[:, ::2, ::2], net((9, 5)), atol=1e-5)
    stretched = torch.nn.functional.interpolate(net((9, 9))[None], (17, 17), mode="nearest")[0]
    assert not torch.allclose(net((17, 17)), stretched, atol=1e-2)


@pytest.mark.parametrize("fan_in", [1, 49])
@torch.no_grad()
def test_first_kernels_have_the_variance_of_weights(fan_in):
    power = [SlowNet(256, fan_in=fan_in)((32, 32)).square().mean() for _ in range(4)]
    assert float(torch.stack(power).mean()) * fan_in == pytest.approx(1.0, rel=0.25)


@torch.no_grad()
def test_kept_kernels_follow_parameters_sizes_and_mode():
    net = SlowNet(4).eval()
    runs: list[int] = []
    net.output.register_forward_hook(lambda *_: runs.append(1))
    generate, counted = net.generate, []
    net.generate = lambda size: counted.append(size) or generate(size)
    first = net((6, 6))
    assert torch.equal(net((6, 6)), first) and net((7, 6)).shape == (4, 7, 6) and counted == [(6, 6), (7, 6)]
    net.output.bias.add_(1)
    assert torch.allclose(net((6, 6)), first + 1, atol=1e-5)
    other = SlowNet(4)
    net.load_state_dict(copy.deepcopy(other.state_dict()))
    assert torch.allclose(net((6, 6)), other((6, 6)))
    net.output.weight = torch.nn.Parameter(torch.zeros_like(net.output.weight))
    assert not net((6, 6)).any()
    for side in range(2, 12):
        net((side, side))
    assert len(net._kept) <= 4
    with torch.enable_grad():
        net((6, 6)).sum().backward()
    assert net.output.bias.grad is not None, "in eval mode gradients still reach it"
    assert not any("kept" in name for name in net.state_dict())
    assert net.train() is net and not net._kept
