"""Poincare convolution: numbers of hypll, no patches in memory, the identity, and its complaints."""

import pytest
import torch
from torch import Tensor

from opsin.errors import BadInput
from opsin.layers.poincare import exp0, log0
from opsin.ops.conv.poincare_conv import PoincareConv, PoincareConv2d, beta

# hypll 0.1.1, HConvolution2d(2, 3, kernel 3, padding 1) at c = 0.1: weights 0.4 wave(3, 18) transposed, offsets 0.3,
# -0.2, 0.1; input exp0(wave(1, 2, 3, 3)); log0 of the output.
HYPLL = [
    -1.316705,
    -1.219803,
    -0.278213,
    0.292404,
    0.970611,
    0.287159,
    -0.292921,
    -1.254553,
    -1.330809,
    -0.108779,
    -0.001948,
    0.935422,
    1.553614,
    2.38508,
    1.600698,
    1.016487,
    0.082444,
    -0.087059,
    -0.785832,
    -0.741858,
    0.149701,
    0.686365,
    1.425927,
    0.791414,
    0.266543,
    -0.591145,
    -0.749513,
]


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def stirred(*args: int, **options: object) -> PoincareConv2d:
    conv = PoincareConv2d(*args, **options)
    with torch.no_grad():
        conv.weight.normal_(std=0.3)
        conv.bias.normal_(std=0.3)
    return conv


def test_numbers_of_hypll():
    conv = PoincareConv2d(2, 3)
    with torch.no_grad():
        conv.weight.copy_(0.4 * wave(3, 18).view(3, 2, 3, 3))
        conv.bias.copy_(torch.tensor([0.3, -0.2, 0.1]))
    assert torch.allclose(conv(wave(1, 2, 3, 3)).flatten(), torch.tensor(HYPLL), atol=1e-5)


@pytest.mark.parametrize("curvature", [0.1, 1.0])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 1)])
def test_without_patches_it_is_the_definition(kernel, stride, curvature):
    conv, x = stirred(4, 6, kernel_size=kernel, stride=stride, curvature=curvature), torch.randn(2, 4, 9, 7)
    assert torch.allclose(conv(x), conv.reference(x), atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_the_definition_takes_half_precision():
    conv, x = stirred(4, 6).bfloat16(), torch.randn(2, 4, 9, 7).bfloat16()
    y = conv.reference(x)
    assert y.dtype == torch.bfloat16 and torch.allclose(y, conv(x), atol=0.02, rtol=0.02)
    assert torch.equal(y, conv.float().reference(x.float()).bfloat16()), "it does not compute in single precision"


def test_far_features_stay_finite():
    conv, x = stirred(4, 4), (100 * torch.randn(2, 4, 6, 6)).requires_grad_()
    y = conv(x)
    y.square().sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and conv.weight.grad.isfinite().all()
    assert (0.1**0.5 * exp0(y, 0.1, 1).norm(dim=1)).max() <= 1 - 4e-3 + 1e-5
    zero = torch.zeros(1, 4, 5, 5, requires_grad=True)
    conv(zero).square().sum().backward()
    assert zero.grad.isfinite().all() and zero.grad.any()


def test_the_identity_passes_the_first_entries_of_a_patch():
    conv, x = PoincareConv(4, kernel_size=1), torch.randn(2, 4, 5, 5)
    assert torch.allclose(conv(x), x, atol=1e-5)
    small, wide = 1e-3 * torch.randn(1, 4, 6, 6), PoincareConv(4)
    ratio = beta(4 * 9 / 2) / beta(4 / 2)
    expected = ratio * small[0, 0, :4, :4]  # output 0 is the top left tap of channel 0
    assert torch.allclose(wide(small)[0, 0, 1:5, 1:5], expected, atol=1e-7)
    assert conv.weight.flatten(1).equal(torch.eye(4) / 2)


def test_scaling_keeps_the_length_of_a_position():
    """A patch of nine positions is about as long as one of them (HNN++'s beta concatenation)."""
    x = torch.randn(4000, 16)
    patch = torch.randn(4000, 16 * 9) * beta(72.0) / beta(8.0)
    assert patch.norm(dim=1).mean() == pytest.approx(float(x.norm(dim=1).mean()), rel=0.03)


def test_flat_space_is_a_convolution():
    conv, x = stirred(4, 6, curvature=1e-6), torch.randn(2, 4, 7, 7)
    flat = torch.nn.functional.conv2d(2 * conv.shrink * x, conv.weight, padding=1)
    flat = flat - 2 * (conv.weight.flatten(1).norm(dim=1) * conv.bias)[:, None, None]
    assert torch.allclose(conv(x), flat, atol=1e-2)
    assert torch.allclose(log0(exp0(x, 1e-6, 1), 1e-6, 1), x, atol=1e-4)


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=2 is even"):
        PoincareConv(4, kernel_size=2)
    with pytest.raises(BadInput, match="curvature=0 is not positive"):
        PoincareConv(4, curvature=0)
