"""Coordinate-aware modulation: the official layer's numbers, the grid's nodes, and what is normalised over what."""

import pytest
import torch
from scipy.interpolate import RegularGridInterpolator
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.normact.cam_neural_field import (
    CoordinateAwareModulation,
    Modulation,
    TemporalModulation,
    TriPlane,
    interpolated,
    pixel_centres,
)  # fmt: skip

# maincold2/CAM, CAM_image.py: FCLayer_aff(3, 4) on the 3x2 pixel centres, its weight, bias and grid filled by `wave`.
OFFICIAL = [
    0.0, 0.0, 0.0, 0.0, 0.384843, 0.0, 0.0, 0.0, 0.876414, 0.708695, 0.867974, 0.966583, 0.0, 1.208121, 0.0, 0.166792,
    0.008108, 0.217401, 0.0, 0.0, 0.473689, 0.364565, 2.069147, 0.0,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    return module


@torch.no_grad()
def test_numbers_of_the_official_layer():
    op = CoordinateAwareModulation(4)
    op.modulation.grid.copy_(wave(2, 32, 32, step=0.37).mT)  # their grid has columns first
    h = F.linear(wave(6, 3, step=0.9), wave(4, 3), wave(4, step=0.3))
    y = op(h.T.view(1, 4, 3, 2)).relu()
    assert torch.allclose(y[0].flatten(1).T.flatten(), torch.tensor(OFFICIAL), atol=2e-6)


@pytest.mark.parametrize("size", [(7,), (4, 6), (3, 4, 5)])
def test_values_between_nodes(size):
    grid = torch.randn(2, *size)
    places = torch.rand(50, len(size))
    for values, row in zip(grid, interpolated(grid, places).T):
        axes = [torch.linspace(0, 1, side).numpy() for side in size]
        expected = RegularGridInterpolator(axes, values.numpy())(places.numpy())
        assert torch.allclose(row, torch.tensor(expected, dtype=torch.float32), atol=1e-5)


def test_nodes_are_returned_exactly_and_hold_beyond_the_edge():
    grid = torch.randn(2, 3, 5)
    nodes = torch.cartesian_prod(torch.linspace(0, 1, 3), torch.linspace(0, 1, 5))
    assert torch.allclose(interpolated(grid, nodes), grid.flatten(1).T, atol=1e-6)
    assert torch.allclose(interpolated(grid, torch.tensor([[2.0, -1.0]]))[0], grid[:, 2, 0], atol=1e-6)


def test_pixel_centres_go_row_by_row():
    assert pixel_centres(2, 4)[:2].tolist() == [[0.25, 0.125], [0.25, 0.375]] and pixel_centres(5).shape == (5, 1)


@torch.no_grad()
def test_at_first_it_is_a_norm_of_each_position():
    op, x = CoordinateAwareModulation(6), 3 + 2 * torch.randn(2, 6, 5, 7)
    plain = F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2)
    assert torch.allclose(op(x), plain, atol=1e-5)
    assert sum(p.numel() for p in op.parameters()) == 2 * 32 * 32


@torch.no_grad()
def test_positions_and_images_do_not_see_each_other():
    op, x = stirred(CoordinateAwareModulation(6, (4, 8))), torch.randn(3, 6, 5, 7)
    other = x.clone()
    other[1], other[0, :, 2, 3] = 9.0, -5.0
    same = (op(x) - op(other)).abs().amax(1) == 0
    assert same.sum() == 3 * 35 - 35 - 1 and not same[0, 2, 3]


@torch.no_grad()
def test_two_numbers_per_place_for_all_channels_at_any_resolution():
    op = CoordinateAwareModulation(5, 2)
    op.modulation.grid.copy_(torch.tensor([[[1.0, 2], [3, 4]], [[0.0, 0], [8, 8]]]))
    x = torch.randn(1, 5, 1, 5).expand(1, 5, 4, 5)
    y = op(x) - 8 * ((torch.arange(4) + 0.5) / 4)[:, None]
    ratio = y / CoordinateAwareModulation(5)(x)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), atol=1e-3)
    assert torch.allclose(ratio[0, 0, 0, :2], torch.tensor([1 + 0.25 + 0.1, 1 + 0.25 + 0.3]), atol=1e-3)


@torch.no_grad()
def test_video_has_numbers_per_channel_and_time():
    op, x = TemporalModulation(3, 5), torch.randn(2, 3, 6, 8)
    assert torch.allclose(op(x, torch.tensor([0.0, 1.0])), F.instance_norm(x), atol=1e-5)
    stirred(op)
    y = op(x, torch.tensor([0.5, 0.125]))  # the third node, and half-way between the first two
    scale, shift = op.grid.chunk(2)
    expected = F.instance_norm(x[:1]) * scale[:, 2, None, None] + shift[:, 2, None, None]
    assert torch.allclose(y[:1], expected, atol=1e-5)
    between = F.instance_norm(x[1:]) * scale[:, :2].mean(1)[:, None, None] + shift[:, :2].mean(1)[:, None, None]
    assert torch.allclose(y[1:], between, atol=1e-5)


def test_planes_multiply_scales_and_add_shifts():
    planes = TriPlane(3)
    with torch.no_grad():
        planes.grid.add_(torch.randn_like(planes.grid))
    place = torch.tensor([[0.5, 0.0, 1.0]])  # nodes 1, 0, 2
    nodes = [planes.grid[0, :, 1, 0], planes.grid[1, :, 1, 2], planes.grid[2, :, 0, 2]]
    scale, shift = planes(place)
    assert torch.allclose(scale[0, 0], nodes[0][0] * nodes[1][0] * nodes[2][0], atol=1e-5)
    assert torch.allclose(shift[0, 0], nodes[0][1] + nodes[1][1] + nodes[2][1], atol=1e-5)


def test_shifts_of_fresh_planes_learn_where_a_product_would_not():
    planes = TriPlane(4)
    sum(planes(torch.rand(9, 3))).sum().backward()
    assert planes.grid.grad[:, 0].any() and planes.grid.grad[:, 1].any()
    zeros = torch.zeros(3, 4, requires_grad=True)
    zeros.prod(0).sum().backward()
    assert not zeros.grad.any(), "the product of three fresh planes of shifts would stay where it is"


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="at least 2 nodes"):
        Modulation(1, 4)
