"""The complex layers: PyTorch's complex arithmetic, whitening, scipy's resampling, and what the package gets wrong."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.layers import complex as cx
from opsin.layers.complex.convert import as_complex
from opsin.layers.complex.norm import inverse_root, statistics
from opsin.layers.norm import LayerNorm2d


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.cfloat)


def skewed(*shape: int) -> Tensor:
    """Parts of unequal power that are correlated, off centre."""
    z = noise(*shape)
    return z + 0.7 * z.conj() * torch.polar(torch.ones(()), torch.tensor(0.9)) + (2 - 1j)


def by_hand(function, x: Tensor, layer: nn.Module, **options: object) -> Tensor:
    """(A*u - B*v) + i(B*u + A*v), and the offset once."""
    a, b, u, v = layer.weight.real, layer.weight.imag, x.real, x.imag
    z = torch.complex(function(u, a, **options) - function(v, b, **options),
                      function(u, b, **options) + function(v, a, **options))  # fmt: skip
    return z + layer.bias.view(-1, *[1] * (x.ndim - 2))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_are_four_real_ones_and_the_offset_counts_once(axes, transposed):
    """The package adds its complex offset to all four products: (b_r - b_i) + i(b_r + b_i) comes out instead of b."""
    name = f"{'Transpose' if transposed else ''}{axes}d"
    layer = getattr(cx, f"ComplexConv{name}")(4, 6, 3, stride=2, padding=1)
    function = getattr(F, f"conv{'_transpose' if transposed else ''}{axes}d")
    x = noise(2, 4, *(7,) * axes)
    assert torch.allclose(layer(x), by_hand(function, x, layer, stride=2, padding=1), atol=1e-5)
    zero = layer(torch.zeros_like(x))
    assert torch.allclose(zero, layer.bias.view(-1, *[1] * axes).expand_as(zero))


def test_linear_layer():
    layer, x = cx.ComplexLinear(5, 3), noise(4, 5)
    assert torch.allclose(layer(x), by_hand(F.linear, x, layer), atol=1e-6)


@torch.no_grad()
def test_first_weights_have_the_variance_of_real_ones():
    real, ours = nn.Conv2d(32, 64, 3), cx.ComplexConv2d(32, 64, 3)
    assert ours.weight.abs().square().mean() == pytest.approx(float(real.weight.square().mean()), rel=0.05)
    assert ours.weight.real.std() == pytest.approx(float(real.weight.std()) / math.sqrt(2), rel=0.05)
    fan_in, fan_out = 32 * 9, 64 * 9
    for criterion, fan in (("he", fan_in), ("glorot", fan_in + fan_out)):
        weight = cx.trabelsi_(torch.empty(64, 32, 3, 3, dtype=torch.cfloat), criterion)
        assert weight.abs().square().mean() == pytest.approx(2 / fan, rel=0.05)
        rayleigh = scipy.stats.kstest(weight.abs().flatten().numpy(), "rayleigh", args=(0, fan**-0.5))
        phase = scipy.stats.kstest(weight.angle().flatten().numpy(), "uniform", args=(-math.pi, 2 * math.pi))
        assert rayleigh.pvalue > 1e-3 and phase.pvalue > 1e-3


def test_the_inverse_root_is_that_of_scipy():
    factor = torch.randn(2, 2, dtype=torch.float64)
    matrix = factor @ factor.T + 0.1 * torch.eye(2)
    rr, ri, ii = inverse_root(matrix[0, 0], matrix[0, 1], matrix[1, 1])
    expected = np.linalg.inv(scipy.linalg.sqrtm(matrix.numpy()))
    assert np.allclose([[rr, ri], [ri, ii]], expected)


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (cx.ComplexBatchNorm(6), (8, 6, 7, 5), (0, 2, 3)), (cx.ComplexBatchNorm(6), (64, 6), (0,)),
        (cx.ComplexLayerNorm(40), (3, 4, 40), (2,)), (cx.ComplexLayerNorm2d(24), (2, 24, 3, 4), (1,)),
    ],
)  # fmt: skip
def test_norms_leave_the_identity_as_covariance(layer, shape, axes):
    z = skewed(*shape)
    assert statistics(z, axes)[1][1].abs().mean() > 0.1
    mean, (rr, ri, ii) = statistics(layer(z), axes)
    assert mean.abs().max() < 1e-4 and ri.abs().max() < 1e-3
    assert (rr - 1).abs().max() < 1e-3 and (ii - 1).abs().max() < 1e-3


def test_group_norm_whitens_every_sample_and_group_on_its_own():
    """The package's function fails on most shapes, and where it runs takes two samples' statistics for all."""
    z, layer = skewed(3, 6, 4, 5), cx.ComplexGroupNorm(2, 6)
    _, (rr, ri, ii) = statistics(layer(z).reshape(3, 2, -1), (2,))
    assert torch.stack(((rr - 1).abs(), ri.abs(), (ii - 1).abs())).max() < 1e-3
    changed = z.clone()
    changed[1:] = 5 * noise(2, 6, 4, 5)
    changed[0, 3:] *= 7
    assert torch.allclose(layer(changed)[0, :3], layer(z)[0, :3], atol=1e-5)


def test_the_naive_norm_leaves_the_correlation_and_both_parts():
    """With the package's first weight, 1 + 0i, its naive norm multiplies all imaginary parts by 0."""
    z = skewed(16, 4, 6, 6)
    y = cx.NaiveBatchNorm(4)(z)
    assert torch.allclose(y.real, F.batch_norm(z.real, None, None, training=True), atol=1e-5)
    assert torch.allclose(y.imag, F.batch_norm(z.imag, None, None, training=True), atol=1e-5)
    assert statistics(y, (0, 2, 3))[1][1].abs().max() > 0.1


FLAT = {  # parts that are proportional, or nearly: det Cov cancels in float32
    "one phase at variance 1000": (cx.ComplexBatchNorm(64), lambda: _line(16, 64, 8, 8, scale=1000**0.5)),
    "two samples of 1x1": (cx.ComplexBatchNorm(512), lambda: 30 * noise(2, 512, 1, 1)),
    "two channels": (cx.ComplexLayerNorm2d(2), lambda: 30 * noise(4, 2, 32, 32)),
    "one constant": (cx.ComplexGroupNorm(2, 4), lambda: torch.full((2, 4, 3, 3), 200 + 100j)),
}


def _line(*shape: int, scale: float) -> Tensor:
    """Complex numbers of one phase."""
    return scale * torch.randn(*shape) * torch.polar(torch.ones(()), torch.tensor(0.9))


@pytest.mark.parametrize("name", list(FLAT))
def test_whitening_stays_finite_where_the_parts_are_proportional(name):
    layer, draw = FLAT[name]
    z = draw().requires_grad_()
    y = layer(z)
    y.abs().square().sum().backward()
    assert torch.view_as_real(y.detach()).isfinite().all() and torch.view_as_real(z.grad).isfinite().all()
    assert y.abs().square().mean() < 2.1, "more than the unit variance of both parts"


def test_proportional_parts_are_whitened_along_their_line():
    z = _line(64, 1, 4, 4, scale=30.0)
    y = cx.ComplexBatchNorm(1)(z)
    assert torch.allclose(y, (z - z.mean()) / (z - z.mean()).abs().square().mean().sqrt(), atol=0.05)


@torch.no_grad()
def test_batch_norm_in_eval_uses_running_statistics():
    layer, z = cx.ComplexBatchNorm(4, momentum=1.0), skewed(16, 4, 6, 6)
    trained = layer(z)
    assert torch.allclose(layer.eval()(z), trained, atol=1e-4)
    assert torch.allclose(layer(z[:1]), trained[:1], atol=1e-4)
    half = cx.ComplexBatchNorm(4, momentum=0.5)
    half(z)
    assert torch.allclose(half.running_mean, layer.running_mean / 2, atol=1e-6)
    assert torch.allclose(half.running_covariance[0, 1], layer.running_covariance[0, 1] / 2, atol=1e-6)
    usual = cx.ComplexBatchNorm(4)
    usual(z)
    assert torch.allclose(usual.running_mean, layer.running_mean / 10, atol=1e-6), "a new batch counts for a tenth"
    eye = torch.eye(2)[:, :, None]
    assert torch.allclose(usual.running_covariance, 0.9 * eye + 0.1 * layer.running_covariance, atol=1e-5)
    small = cx.ComplexBatchNorm(4, diagonal=2**-0.5)
    assert small(z).abs().square().mean() == pytest.approx(1.0, abs=1e-3)


def test_activations_keep_what_they_promise():
    z = noise(4, 3, 64, 64)
    assert torch.equal(cx.CReLU()(z), torch.complex(z.real.relu(), z.imag.relu()))
    first = (z.angle() > 0) & (z.angle() < math.pi / 2)
    assert torch.equal(cx.ZReLU()(z), torch.where(first, z, torch.zeros_like(z)))
    assert (cx.ZReLU()(z) != 0).float().mean() == pytest.approx(0.25, abs=0.02)
    for layer, radius in ((cx.ModReLU(bias=-0.4), 0.4), (cx.CModReLU(threshold=0.4), 0.4)):
        y, outside = layer(z), z.abs() > radius + 1e-4
        assert torch.allclose(y.abs(), (z.abs() - radius).relu(), atol=1e-4)
        assert torch.allclose(y[outside] / y[outside].abs().clamp_min(1e-9), z[outside] / z[outside].abs(), atol=1e-3)
    assert torch.allclose(cx.CSiLU()(z), z * z.abs().sigmoid(), atol=1e-5)
    assert torch.allclose(cx.MagnitudeSoftmax()(z), z.abs().softmax(1), atol=1e-6)
    per_channel = cx.ModReLU(3)
    with torch.no_grad():
        per_channel.bias.copy_(torch.tensor([0.0, -10.0, 0.0]))
    assert not per_channel(z)[:, 1].any() and per_channel(z)[:, 0].all()


def test_tanh_and_sigmoid_are_not_the_packages():
    """The package's tanh takes sin 2u for sin 2v, and its sigmoid divides a part of the numerator only."""
    z = noise(5, 5)
    u, v = z.real, z.imag
    bottom = torch.cosh(2 * u) + torch.cos(2 * v)
    assert torch.allclose(cx.ComplexTanh()(z), torch.complex(torch.sinh(2 * u), torch.sin(2 * v)) / bottom, atol=1e-4)
    assert not torch.allclose(cx.ComplexTanh()(z).imag, torch.sin(2 * u) / bottom, atol=1e-2)
    assert torch.equal(cx.ComplexSigmoid()(z), torch.complex(u.sigmoid(), v.sigmoid()))


def test_gradients_are_finite_at_zero():
    for layer in (cx.ModReLU(bias=0.1), cx.CModReLU(), cx.CSiLU(), cx.MagnitudeSoftmax()):
        z = torch.zeros(1, 2, 3, dtype=torch.cfloat, requires_grad=True)
        layer(z).abs().square().sum().backward()
        assert torch.view_as_real(z.grad).isfinite().all()


def test_the_maximum_by_magnitude_turns_with_the_phase_and_that_by_parts_does_not():
    z, turn = noise(2, 3, 8, 8), torch.polar(torch.ones(()), torch.tensor(0.8))
    strongest, parts = cx.MagnitudeMaxPool(2), cx.PartsMaxPool(2)
    assert torch.allclose(strongest(z * turn), strongest(z) * turn, atol=1e-6)
    assert not torch.allclose(parts(z * turn), parts(z) * turn, atol=1e-2)
    assert torch.allclose(strongest(z).abs(), F.max_pool2d(z.abs(), 2))
    assert torch.equal(parts(z).imag, F.max_pool2d(z.imag, 2))
    assert torch.allclose(cx.ComplexAvgPool(2)(z), z.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)), atol=1e-6)
    assert torch.allclose(cx.ComplexAdaptiveAvgPool(1)(z)[..., 0, 0], z.mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("old", [8, 7])
@pytest.mark.parametrize("size", [(16, 16), (5, 8), (6, 11), (13, 4), (12, 9)])
def test_sinc_resizing_is_scipys(old, size):
    z = noise(2, 3, old, old)
    expected = z.numpy()
    for axis, side in zip((2, 3), size, strict=True):
        expected = scipy.signal.resample(expected, side, axis=axis)
    assert torch.allclose(cx.ComplexUpsample(size)(z), torch.from_numpy(expected), atol=1e-5)


def test_upsampling_by_a_factor_and_by_parts():
    z = noise(1, 2, 4, 4)
    assert cx.ComplexUpsample(scale_factor=2)(z).shape == (1, 2, 8, 8)
    assert torch.allclose(cx.ComplexUpsample(scale_factor=2)(z)[..., ::2, ::2], z, atol=1e-6)
    assert torch.equal(
        cx.ComplexUpsample(scale_factor=2, mode="nearest")(z).imag, F.interpolate(z.imag, scale_factor=2)
    )
    with pytest.raises(BadInput, match="exactly one"):
        cx.ComplexUpsample()


def test_dropout_takes_both_parts_or_none():
    z = noise(4, 6, 8, 8)
    y = cx.ComplexDropout(0.5)(z)
    dropped = y == 0
    assert torch.equal(y.real == 0, y.imag == 0) and 0.3 < dropped.float().mean() < 0.7
    assert torch.allclose(y[~dropped], 2 * z[~dropped])
    channels = (cx.ComplexDropout(0.5, axes=2)(z) == 0).flatten(2)
    assert torch.equal(channels.all(2), channels.any(2)) and channels.any() and not channels.all()
    assert torch.equal(cx.ComplexDropout(0.5).eval()(z), z)


@pytest.mark.parametrize(
    "spec",
    ["resnet(depths=(1, 1), dims=(4, 8), stem=cifar, num_classes=3)", "metanet_n(depths=(1, 1, 1, 1), num_classes=3)"],
)
def test_networks_become_complex_and_learn(spec):
    net = cx.to_complex(opsin.create(spec))
    weights = [p for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear) for p in m.parameters(recurse=False)]
    assert weights and all(p.is_complex() for p in weights)
    x, y = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
    optimiser, losses = torch.optim.AdamW(net.parameters(), 1e-2), []
    for _ in range(15):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert not net(x).is_complex() and losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().any() for p in net.parameters())


class Functional(nn.Module):
    """Calls everything as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv(x).relu(), 2)
        return F.dropout(F.interpolate(x, scale_factor=2), 0.5, self.training)


def test_functions_inside_a_network_are_caught():
    x = torch.randn(2, 2, 8, 8)
    net = cx.to_complex(Functional(), head="real").eval()
    z = net.model.conv(torch.complex(x, torch.zeros_like(x)))
    pooled = cx.PartsMaxPool(2)(cx.CReLU()(z))
    assert torch.allclose(net(x), F.interpolate(pooled.real, scale_factor=2), atol=1e-6)
    strong = cx.to_complex(Functional(), activation=cx.ModReLU(bias=-100.0))
    assert strong.eval()(x).abs().max() < 1e-5, "the activation that was asked for is not taken"
    with pytest.raises(RuntimeError):
        net.model(torch.complex(x, x))


def test_real_images_become_complex_ones():
    x = torch.randn(2, 4, 6, 9)
    assert torch.equal(as_complex(x, "zero").real, x) and not as_complex(x, "zero").imag.any()
    assert torch.allclose(as_complex(x, "fft").abs().square().sum(), x.square().sum(), rtol=1e-5)
    for width in (9, 8):
        analytic = torch.from_numpy(scipy.signal.hilbert(x[..., :width].numpy())).to(torch.cfloat)
        assert torch.allclose(as_complex(x[..., :width], "analytic"), analytic, atol=1e-5)
    assert torch.equal(as_complex(x, "pairs"), torch.complex(x[:, :2], x[:, 2:]))
    for how in ("zero", "fft", "analytic"):
        net = cx.to_complex(nn.Conv2d(4, 2, 1, bias=False), input=how, head="real")
        assert torch.allclose(net(x), net.model(as_complex(x, how)).real, atol=1e-6)


def network(width: int, channels: int = 2) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3)
    )


def test_the_triple_of_the_comparison():
    cnn, doubled, ours = cx.comparison_triple(
        lambda w: network(w, 1), 12, input="pairs", real_build=network
    )  # fmt: skip
    sizes = [cx.real_parameters(net) for net in (cnn, doubled, ours)]
    assert sizes[0] < 0.6 * sizes[2] and abs(sizes[1] / sizes[2] - 1) < 0.02
    assert cx.real_parameters(ours) == sum(torch.view_as_real(p).numel() if p.is_complex() else p.numel()
                                           for p in ours.parameters())  # fmt: skip
    x = torch.randn(2, 2, 8, 8)
    assert cnn(x).shape[0] == doubled(x).shape[0] == ours(x).shape[0] == 2
    with pytest.raises(BadInput, match="start from a larger width"):
        cx.comparison_triple(network, 2, tolerance=1e-4)


def test_layers_without_a_complex_form_are_named():
    with pytest.raises(BadInput, match=r"PReLU\(num_parameters=1\) has no complex form"):
        cx.to_complex(nn.ModuleDict({"attention": nn.PReLU()}))


@pytest.mark.parametrize("kind", ["metanet_n(depths=(1, 1, 1, 1), mixer=self_attention)", "twins_svt_small"])
def test_networks_with_attention_are_refused_in_a_sentence(kind):
    net = cx.to_complex(opsin.create(kind))
    with pytest.raises(BadInput, match="scaled_dot_product_attention has no complex form; `to_complex` is for conv"):
        net(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize("layer", [nn.GLU(1), nn.MultiheadAttention(4, 2), nn.InstanceNorm2d(4)])
def test_real_only_layers_are_refused_at_conversion(layer):
    with pytest.raises(BadInput, match=f"{type(layer).__name__}.* has no complex form"):
        cx.to_complex(nn.Sequential(nn.Conv2d(3, 4, 1), layer))


class OddLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


class OddNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("layer", [OddLinear(4, 4), OddNorm(4)])
def test_layers_that_compute_something_else_than_their_base_are_refused(layer):
    with pytest.raises(BadInput, match=r"Odd.* has no complex form"):
        cx.to_complex(layer)


@pytest.mark.parametrize("layer", [nn.Hardshrink(), nn.LocalResponseNorm(3), nn.Threshold(0.1, 0.0)])
def test_real_only_functions_are_named_at_the_first_call(layer):
    with pytest.raises(BadInput, match=r"^(hardshrink|local_response_norm|threshold) has no complex form"):
        cx.to_complex(nn.Sequential(nn.Conv2d(3, 4, 1), layer))(torch.randn(1, 3, 4, 4))


def test_errors_that_have_other_reasons_stay_as_they_are():
    with pytest.raises(RuntimeError, match="channels"):
        cx.to_complex(nn.Conv2d(3, 4, 1))(torch.randn(1, 2, 4, 4))


@pytest.mark.parametrize("layer", [nn.Softplus(), nn.SELU(), nn.CELU(), nn.LogSigmoid()])
def test_more_activations_act_on_both_parts(layer):
    z = noise(2, 3, 4, 4)
    assert torch.equal(cx.to_complex(layer, head="real")(z), layer(z.real))
    assert not cx.to_complex(layer, head="real", activation=torch.zeros_like)(z).any()


def test_probabilities_at_the_end_are_those_of_the_magnitude():
    z = noise(2, 5)
    assert torch.allclose(cx.to_complex(nn.Softmax(1))(z), z.abs().softmax(1), atol=1e-6)
    assert torch.allclose(cx.to_complex(nn.LogSoftmax(1))(z), z.abs().log_softmax(1), atol=1e-5)


def test_options_of_norms_are_kept():
    z = skewed(6, 4, 5, 5)
    bare = cx.to_complex(nn.BatchNorm2d(4, eps=1e-3, momentum=0.3, affine=False, track_running_stats=False)).model
    assert not [*bare.parameters(), *bare.buffers()] and (bare.eps, bare.momentum) == (1e-3, 0.3)
    assert torch.equal(bare.eval()(z), bare.train()(z)), "without running statistics eval takes those of the batch"
    tracked = cx.to_complex(nn.BatchNorm2d(4, affine=False)).model
    tracked(z)
    assert len([*tracked.buffers()]) == 2 and not torch.equal(tracked.eval()(z), tracked.train()(z))
    plain = [nn.LayerNorm(5, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False)]
    for layer, whole in zip(plain, (cx.ComplexLayerNorm(5), cx.ComplexGroupNorm(2, 4)), strict=True):
        ours = cx.to_complex(layer).model
        assert not [*ours.parameters()] and torch.equal(ours(z), whole(z))
    free = cx.to_complex(nn.LayerNorm(5, bias=False)).model
    assert [name for name, _ in free.named_parameters()] == ["affine.weight"] and free(z).shape == z.shape


def test_the_complex_network_is_where_and_as_precise_as_the_real_one():
    net = nn.Sequential(network(4, 3), LayerNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2)).double()
    ours = cx.to_complex(net)
    assert {p.dtype for p in ours.parameters()} == {torch.float64, torch.complex128}
    assert ours(torch.randn(2, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    half = cx.to_complex(network(4, 3).bfloat16())
    x = torch.randn(2, 3, 8, 8).bfloat16()
    assert half(x).isfinite().all() and half.eval()(x).isfinite().all()
    meta = cx.to_complex(network(4, 3).to("meta"))
    assert all(t.is_meta for t in (*meta.parameters(), *meta.buffers()))
    assert meta(torch.randn(2, 3, 8, 8, device="meta")).shape == (2, 8, 4, 4)
