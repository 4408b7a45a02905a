"""Deformable convolution against loops, and every rung of the ladder against what it promises."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput, UnknownName
from opsin.layers.fake_quant import fake_quantised
from opsin.measure.cost import count_macs
from opsin.ops.conv.codesign_deform_conv import OFFSETS, CodesignDeformConv, operator_macs, window_rows
from opsin.ops.conv.deformable import DeformConv2d, Geometry, deform_conv2d

SHAPES = [  # channels, filters, groups, offset groups, kernel, stride, padding, dilation
    (4, 4, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (4, 4, 4, 2, (3, 3), (2, 2), (1, 1), (1, 1)),
    (4, 8, 4, 1, (3, 3), (1, 1), (1, 1), (1, 1)),
    (6, 4, 2, 3, (3, 3), (1, 1), (2, 2), (2, 2)),
    (6, 5, 1, 1, (2, 3), (2, 1), (1, 0), (1, 1)),
]


def looped(x: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor) -> Tensor:
    """The papers' equations, one sample at a time."""
    n, channels, height, width = x.shape
    (rows, columns), taps = geometry.out_size((height, width)), geometry.taps
    filters, depth = weight.shape[:2]
    per_group, per_offset = filters // (channels // depth), channels // (offset.shape[1] // (2 * taps))
    out = x.new_zeros(n, filters, rows, columns)
    for b, i, j, k, c in torch.cartesian_prod(*map(torch.arange, (n, rows, columns, taps, channels))).tolist():
        tap, moved = divmod(k, geometry.kernel[1]), c // per_offset * taps + k
        y, z = (
            place * geometry.stride[a] - geometry.padding[a] + geometry.dilation[a] * tap[a]
            + float(offset[b, 2 * moved + a, i, j])
            for a, place in enumerate((i, j))
        )  # fmt: skip
        value = 0.0
        for yy, zz in ((math.floor(y) + p, math.floor(z) + q) for p in (0, 1) for q in (0, 1)):
            if 0 <= yy < height and 0 <= zz < width:
                value += (1 - abs(y - yy)) * (1 - abs(z - zz)) * float(x[b, c, yy, zz])
        group = slice(c // depth * per_group, (c // depth + 1) * per_group)
        out[b, group, i, j] += weight[group, c % depth].flatten(1)[:, k] * value * mask[b, moved, i, j]
    return out


def operands(shape: tuple) -> tuple[list[Tensor], Geometry]:
    torch.manual_seed(0)
    channels, filters, groups, offset_groups, *rest = shape
    geometry = Geometry(*rest)
    size = geometry.out_size((4, 5))
    x, weight = torch.randn(2, channels, 4, 5), torch.randn(filters, channels // groups, *geometry.kernel)
    offset = 2 * torch.randn(2, 2 * offset_groups * geometry.taps, *size)
    mask = torch.rand(2, offset_groups * geometry.taps, *size)
    return [t.double().requires_grad_() for t in (x, offset, weight, mask)], geometry


@pytest.mark.parametrize("shape", SHAPES)
def test_deformable_convolution_against_loops_and_its_gradients(shape):
    (x, offset, weight, mask), geometry = operands(shape)

    def ours(x: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(x, offset, weight, None, *geometry[1:], mask)

    with torch.no_grad():
        expected = looped(x, offset, weight, geometry, mask)
    assert torch.allclose(ours(x, offset, weight, mask), expected, atol=1e-10)
    assert torch.autograd.gradcheck(ours, (x, offset, weight, mask), fast_mode=True)


def test_without_offsets_it_is_a_convolution():
    x, weight, bias = torch.randn(2, 6, 9, 7), torch.randn(4, 3, 3, 3), torch.randn(4)
    y = deform_conv2d(x, torch.zeros(2, 18, 5, 4), weight, bias, (2, 2), (1, 1))
    assert torch.allclose(y, F.conv2d(x, weight, bias, 2, 1, groups=2), atol=1e-5)


def test_far_points_are_zero_and_harmless():
    x, weight = torch.randn(1, 2, 5, 5, requires_grad=True), torch.randn(2, 1, 3, 3)
    offset = torch.full((1, 18, 5, 5), 1e30).requires_grad_()
    for sign in (1, -1):
        y = deform_conv2d(x, sign * offset, weight, padding=(1, 1))
        assert not y.any()
        y.sum().backward()
    assert x.grad.isfinite().all() and not offset.grad.any()


def test_no_tensor_is_nine_times_the_map():
    x, weight = torch.randn(1, 32, 12, 12, requires_grad=True), torch.randn(32, 1, 3, 3, requires_grad=True)
    offset = torch.randn(1, 18, 12, 12, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        deform_conv2d(x, offset, weight, padding=(1, 1))
    assert max(kept) < 9 * x.numel() / 4


def at_scale(form: str, s: float, dim: int = 6, **options: object) -> CodesignDeformConv:
    op = CodesignDeformConv(dim, form, **options)
    nn.init.constant_(op.offsets.conv_scale.bias, s)
    return op


@torch.no_grad()
@pytest.mark.parametrize("form", ["square", "rounded"])
def test_whole_scales_are_dilations(form):
    x = torch.randn(2, 6, 17, 19)
    for s in (1, 2, 3):
        op = at_scale(form, s)
        expected = F.conv2d(x, op.conv.weight, padding=s, dilation=s, groups=6)
        assert torch.allclose(op(x), expected, atol=1e-5)
    op = at_scale(form, 2, stride=2)
    assert torch.allclose(op(x), F.conv2d(x, op.conv.weight, stride=2, padding=2, dilation=2, groups=6), atol=1e-5)
    op = at_scale(form, 0)
    assert torch.allclose(op(x), x * op.conv.weight.sum((2, 3)).view(-1, 1, 1), atol=1e-5), "all taps at the centre"
    op = at_scale(form, 2, kernel_size=5)
    assert torch.allclose(op(x), F.conv2d(x, op.conv.weight, padding=4, dilation=2, groups=6), atol=1e-5)


@torch.no_grad()
def test_the_scale_follows_the_place_and_its_bounds():
    op, x = CodesignDeformConv(1), torch.zeros(1, 1, 5, 5)
    x[0, 0] = torch.arange(25.0).view(5, 5) - 12
    nn.init.ones_(op.offsets.conv_scale.weight)
    s = op.offsets.scale(x)
    assert s.min() == -7 and s.max() == 8, "1 - bound and bound"
    offset = op.offsets(x)[0]
    assert offset.shape == (1, 18, 5, 5)
    assert offset[0, :, 2, 3].tolist() == [-1, -1, -1, 0, -1, 1, 0, -1, 0, 0, 0, 1, 1, -1, 1, 0, 1, 1], (
        "(dy, dx), s = 2"
    )


@torch.no_grad()
def test_training_starts_on_the_ordinary_grid():
    x = torch.randn(2, 6, 9, 8)
    for form in OFFSETS:
        op = CodesignDeformConv(6, form)
        plain = F.conv2d(x, op.conv.weight, padding=1, groups=op.conv.groups)
        assert torch.allclose(op(x), plain / 2 if form == "modulated" else plain, atol=1e-5), form


def test_rounding_leaves_whole_scales_and_passes_gradients():
    op, x = at_scale("rounded", 1.3), torch.randn(2, 6, 9, 8)
    nn.init.normal_(op.offsets.conv_scale.weight, std=0.5)
    s = op.offsets.scale(x)
    assert torch.equal(s, s.round()) and len(s.unique()) > 2
    square = CodesignDeformConv(6)
    square.load_state_dict(op.state_dict())
    assert not torch.allclose(square(x), op(x), atol=1e-3)
    op(x).square().sum().backward()
    assert op.offsets.conv_scale.weight.grad.any()


def test_bounds_hold_and_stop_gradients_beyond():
    op = CodesignDeformConv(2, "bounded", bound=2)
    nn.init.constant_(op.offsets.conv_offset.bias, 5.0)
    offset = op.offsets(torch.randn(1, 2, 6, 6))[0]
    assert (offset == 2).all()
    offset.sum().backward()
    assert not op.offsets.conv_offset.bias.grad.any()


@pytest.mark.parametrize("form", OFFSETS)
@pytest.mark.parametrize("out_dim", [24, 40])
def test_multiply_adds_of_the_formula(form, out_dim):
    with torch.device("meta"):
        op, x = CodesignDeformConv(24, form, out_dim=out_dim), torch.empty(2, 24, 7, 9)
        assert count_macs(op, x) == operator_macs(form, 24, out_dim, 2 * 63)


def test_the_square_form_costs_less_than_an_eighth():
    assert operator_macs("square", 256, 128, 1) < operator_macs("full", 256, 128, 1) / 8


@pytest.mark.parametrize(("form", "rows"), [("bounded", 2 * 3 + 3), ("square", 2 * 3 + 1), ("rounded", 2 * 3 + 1)])
def test_rows_that_are_read(form, rows):
    op = CodesignDeformConv(1, form, bound=3)
    nn.init.ones_(op.conv.weight)
    predictor = op.offsets.conv_offset if form == "bounded" else op.offsets.conv_scale
    seen: set[int] = set()
    for bias in (-100.0, -1.5, 0.5, 1.5, 100.0):
        nn.init.constant_(predictor.bias, bias)
        x = torch.rand(1, 1, 21, 21, requires_grad=True)
        op(x)[0, 0, 10].sum().backward()
        seen |= set(x.grad[0, 0].any(1).nonzero().flatten().tolist())
    assert max(seen) - min(seen) + 1 == rows == window_rows(form, 21, bound=3)
    assert window_rows(form, 5, bound=3) == 5 and window_rows("full", 21) == 21


@pytest.mark.parametrize("form", ["full", "square"])
def test_low_precision_reaches_every_layer(form):
    op, x = CodesignDeformConv(6, form, out_dim=8), torch.randn(2, 6, 9, 8)
    low = fake_quantised(op, 4, 8, first_bits=4)
    quantised = [m for m in low.modules() if hasattr(m, "input_quantiser")]
    assert len(quantised) == (2 if form == "full" else 3) and any(isinstance(m, DeformConv2d) for m in quantised)
    assert all(len(row.unique()) <= 16 for m in quantised for row in m.weight.flatten(1))
    y, z = low(x), op(x)
    assert 0 < (y - z).norm() / z.norm() < 0.3


def test_complaints_are_sentences():
    with pytest.raises(UnknownName, match="squared"):
        CodesignDeformConv(4, "squared")
    with pytest.raises(BadInput, match="kernel_size=4"):
        CodesignDeformConv(4, kernel_size=4)
    x, weight = torch.randn(1, 4, 5, 5), torch.randn(4, 1, 3, 3)
    with pytest.raises(BadInput, match=r"offsets of shape \(1, 18, 5, 5\) do not fit.*18, 3, 3"):
        deform_conv2d(x, torch.zeros(1, 18, 5, 5), weight)
    with pytest.raises(BadInput, match="mask"):
        deform_conv2d(x, torch.zeros(1, 18, 3, 3), weight, mask=torch.ones(1, 18, 3, 3))
    with pytest.raises(BadInput, match="3 offset groups"):
        deform_conv2d(x, torch.zeros(1, 54, 3, 3), weight)


@pytest.mark.parametrize("form", ["full", "modulated", "bounded", "square"])
def test_training_under_autocast(form):
    layer, x = CodesignDeformConv(8, form), torch.randn(2, 8, 6, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    assert torch.allclose(y.float(), layer(x), atol=0.05) and torch.isfinite(x.grad).all()
