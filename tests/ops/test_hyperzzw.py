"""HyperZZW: its two closed forms, context, precision, linear cost, and resolutions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.catalog import card_of
from opsin.errors import BadInput
from opsin.layers.slow_net import SlowNet
from opsin.measure.cost import count_macs
from opsin.ops.gating.hyperzzw import HyperZZW, global_zzw, local_zzw, standardise, windowed_zzw


def test_the_closed_forms():
    z, v = torch.randn(2, 4, 7, 9), torch.randn(2, 4, 7, 9)
    wide, near = torch.randn(4, 7, 9), torch.randn(4, 5, 5)
    assert torch.allclose(global_zzw(wide, z, z), z * (z * wide))
    y = local_zzw(near, z, v)
    window = (slice(1, 6), slice(2, 7))
    by_hand = ((near[2] * z[1, 2][window]) * v[1, 2][window]).sum()
    assert torch.allclose(y[1, 2, 3, 4], by_hand, atol=1e-5)
    assert torch.allclose(y, windowed_zzw(near, z, v), atol=1e-5)
    assert torch.allclose(local_zzw(near, z, z), F.conv2d(z * z, near[:, None], padding=2, groups=4), atol=1e-5)


def test_weights_depend_on_the_image():
    """Without the second factor the operator would be linear in v: doubling z doubles the weights."""
    near, z, v = torch.randn(3, 3, 3), torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    for form, kernel in ((local_zzw, near), (global_zzw, torch.randn(3, 6, 6))):
        assert torch.allclose(form(kernel, 2 * z, v), 2 * form(kernel, z, v), atol=1e-5)
        assert torch.allclose(form(kernel, z, 2 * v), form(kernel, 2 * z, v), atol=1e-5)
    op, x = HyperZZW(3, kernel_size=3), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        z = standardise(x)
        assert torch.allclose(op(x), op(5 * x + 3), atol=1e-4), "contrast and brightness are standardised away"
        assert not torch.allclose(op(-x), -op(x), atol=1e-2), "it is not odd, let alone linear"


def seen(op: Callable[[Tensor], Tensor], side: int) -> Tensor:
    """Where on the map the output at the centre depends on it."""
    x = torch.randn(1, 4, side, side, requires_grad=True)
    op(x)[0, :, side // 2, side // 2].square().sum().backward()
    return x.grad.abs().amax((0, 1)) > 0


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_beyond_the_window_only_mean_and_variance_are_seen(kernel_size):
    """As the card says; the standardisation alone would make every output depend on everything."""
    op, near = HyperZZW(4, kernel_size=kernel_size), kernel_size // 2
    window = torch.zeros(13, 13, dtype=torch.bool)
    window[6 - near : 7 + near, 6 - near : 7 + near] = True
    assert torch.equal(seen(op.mix, 13), window)
    assert seen(standardise, 13).all() and seen(op, 13).all()
    assert card_of("hyperzzw").facts["receptive_field"].startswith("the local window: `kernel_size` per side;")


@pytest.mark.parametrize("omega", [0.25, 4.0])
@torch.no_grad()
def test_kernels_are_float32_under_autocast(omega):
    """Neither what autocast computes with nor what it leaves behind in eval mode is rounded to bfloat16."""
    net = SlowNet(8, omega=omega).eval()
    expected = net.generate((9, 9))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net.generate((9, 9)), expected)
        assert torch.equal(net((9, 9)), expected)
    assert torch.equal(net((9, 9)), expected)


@torch.no_grad()
def test_one_call_under_autocast_changes_no_later_one():
    op, x = HyperZZW(4).eval(), torch.randn(1, 4, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x).dtype == torch.bfloat16
    assert torch.allclose(op(x), op.reference(x), atol=1e-5)


@torch.no_grad()
def test_products_do_not_explode():
    x = torch.randn(2, 16, 12, 12)
    for _ in range(12):
        x = HyperZZW(16)(1000 * x)
        assert 0.05 < float(x.std()) < 20
    assert HyperZZW(4)(torch.ones(1, 4, 1, 1)).isfinite().all()


@torch.no_grad()
def test_other_resolutions_redraw_the_kernel():
    op = HyperZZW(4).eval()
    small, large = op.slow_global((5, 5)), op.slow_global((9, 9))
    assert torch.allclose(large[:, ::2, ::2], small, atol=1e-5)
    for size in ((5, 5), (9, 9), (5, 5)):
        x = torch.randn(1, 4, *size)
        assert torch.allclose(op(x), op.reference(x), atol=1e-5)


def test_cost_is_linear_in_positions():
    with torch.device("meta"):
        macs = [count_macs(HyperZZW(8).eval(), torch.empty(1, 8, side, side)) for side in (8, 16, 32)]
    assert (macs[2] - macs[1]) == 4 * (macs[1] - macs[0])


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match="kernel_size=6 is even"):
        HyperZZW(4, kernel_size=6)
