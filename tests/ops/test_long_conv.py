"""Long convolutions: the published layer's numbers, the squash, who sees the future, and the network around them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.ops.spectral.fourier import filtered, response
from opsin.ops.spectral.long_conv import (
    ButterflyLongConv,
    LongConv,
    LongConv2d,
    decaying,
    remap,
    smooth_in_frequency,
    smooth_in_time,
    split_wrapped,
    squash,
)
from opsin.ops.spectral.long_conv_model import LongConvModel
from opsin.ops.spectral.sequence import SequenceClassifier, parameter_groups, pixels

# HazyResearch/safari, standalone_long_convs.py: LongConv(2, 6, channels=1, dropout=0, kernel_lam=0.25), with every
# parameter and the input filled by `wave`. The same weights in random layers and networks agreed to 7e-8 and 6e-8.
OFFICIAL = [
    0.523211, 0.389887, 0.233203, -0.036802, -0.079122, -0.042273,
    0.6937, 0.732878, 0.783864, 0.84106, 0.84858, 0.832392,
]  # fmt: skip


def wave(*shape: int, step: float = 0.7) -> Tensor:
    return torch.sin(step * torch.arange(torch.Size(shape).numel(), dtype=torch.float32)).reshape(shape)


def layer(**options: object) -> LongConv:
    """A layer with taps of size one, so that mistakes show."""
    made = LongConv(4, 20, **options)
    with torch.no_grad():
        made.kernel.normal_()
    return made


def inner(made: LongConv, u: Tensor) -> Tensor:
    """The convolutions by their definition: y[i] = sum over lags."""
    k, length = made.kernels(), u.shape[-1]
    out = torch.zeros(len(u), made.channels, made.dim, length)
    for i in range(length):
        for j in range(length):
            if i >= j:
                out[..., i] += k[: made.channels, :, i - j] * u[:, None, :, j]
            elif made.bidirectional:
                out[..., i] += k[made.channels :, :, j - i - 1] * u[:, None, :, j]
    return out


def test_numbers_of_the_published_layer():
    made = LongConv(2, 6, bidirectional=True, lam=0.25)
    state = {"D": wave(1, 2), "kernel": split_wrapped(wave(1, 2, 12))}
    state |= {"output_linear.0.weight": wave(4, 2), "output_linear.0.bias": wave(4)}
    made.load_state_dict(state)
    for mode in (True, False):
        assert torch.allclose(made.train(mode)(wave(1, 2, 6, step=0.3)).flatten(), torch.tensor(OFFICIAL), atol=2e-6)
    assert remap({"layer.kernel.kernel": wave(2)}).keys() == {"layer.kernel"}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("length", [20, 13, 1])
def test_the_convolution_is_the_sum_over_lags(bidirectional, length):
    made, u = layer(channels=2, bidirectional=bidirectional), torch.randn(3, 4, length)
    expected = inner(made, u)
    assert torch.allclose(made.convolve(u), expected, atol=1e-4)
    y = (expected + made.D[:, :, None] * u[:, None]).flatten(1, 2)
    out = F.glu(made.output_linear[0](F.gelu(y).transpose(1, 2)), -1).transpose(1, 2)
    assert torch.allclose(made(u), out, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(made.eval()(u), out, atol=1e-4)


def test_only_causal_layers_are_blind_to_the_future():
    """At FFT size 2L a kernel of 2L taps, meant to be causal in the published standalone code, looks ahead."""
    u = torch.randn(1, 4, 20)
    later = u.clone()
    later[..., 12:] += 1.0

    def seen_early(function: object) -> float:
        with torch.no_grad():
            return float((function(later) - function(u))[..., :12].abs().max())

    assert seen_early(layer()) < 1e-5 < 1e-2 < seen_early(layer(bidirectional=True))
    kernel = torch.randn(1, 4, 40)
    assert seen_early(lambda x: filtered(x, response(kernel, 40), 0, 40)) > 1e-2
    assert seen_early(lambda x: filtered(x, response(kernel[..., :20], 20), 0, 20)) > 1e-2, "nor without padding"
    two_sided = filtered(u, response(kernel, 40), 0, 40)
    made = layer(bidirectional=True, lam=0.0)
    with torch.no_grad():
        made.kernel.copy_(split_wrapped(kernel))
    assert torch.allclose(made.convolve(u), two_sided, atol=1e-4)


def test_squash():
    k = torch.tensor([-0.5, -0.1, -0.05, 0.0, 0.1, 0.3])
    assert torch.allclose(squash(k, 0.1), torch.tensor([-0.4, 0.0, 0.0, 0.0, 0.0, 0.2]))
    made = layer(lam=0.5)
    assert ((made.kernels() == 0) == (made.kernel.abs() <= 0.5)).all() and (made.kernels() == 0).any()
    made.kernels().sum().backward()
    assert ((made.kernel.grad == 0) == (made.kernel.abs() <= 0.5)).all(), "a tap at zero gets no gradient"


def test_most_taps_start_at_zero_where_lambda_is_large():
    zeros = [(LongConv(32, 200, lam=lam).kernels() == 0).float().mean() for lam in (0.001, 0.003)]
    assert 0.35 < zeros[0] < 0.42 and 0.84 < zeros[1] < 0.89


def test_smoothing():
    k = torch.randn(1, 2, 33, dtype=torch.float64)
    in_time = smooth_in_time(k, 5)
    assert torch.allclose(in_time[..., 10], k[..., 8:13].mean(-1))
    weight = torch.exp(-0.5 * torch.arange(-2.0, 3.0, dtype=torch.float64).square())
    k_f = torch.fft.rfft(k)
    expected = (k_f[..., 6:11] * weight / weight.sum()).sum(-1)
    assert torch.allclose(torch.fft.rfft(smooth_in_frequency(k, 5))[..., 8], expected)
    for smoothing in ("time", "frequency"):
        made = layer(smoothing=smoothing, window=5, lam=0.0)
        function = smooth_in_time if smoothing == "time" else smooth_in_frequency
        assert torch.allclose(made.kernels(), function(made.kernel, 5), atol=1e-6)
        assert not torch.allclose(made.kernels(), made.kernel, atol=0.1)


def test_smoothing_comes_before_the_squash():
    made = layer(smoothing="time", lam=0.2)
    assert torch.allclose(made.kernels(), squash(smooth_in_time(made.kernel, 7), 0.2))
    assert (made.kernels() == 0).any()


def test_decaying_kernels():
    k = decaying(400, 8, 64)
    size = k.square().mean(0).sqrt() / 0.02
    expected = torch.exp(-((8 // 2) ** (torch.arange(8) / 8))[:, None] * torch.arange(64) / 64)
    assert torch.allclose(size, expected, rtol=0.2)
    assert 0.0018 < LongConv(16, 500).kernel.std() < 0.0022


def test_kernel_dropout_is_for_training_only():
    made = layer(kernel_dropout=0.5, lam=0.0)
    dropped = (made.kernels() == 0).float().mean()
    assert 0.3 < dropped < 0.7 and not (made.eval().kernels() == 0).any()


def test_spectra_are_kept_per_length_and_follow_every_parameter():
    made, u = layer(bidirectional=True, lam=0.2).eval(), torch.randn(2, 4, 20)
    with torch.no_grad():
        for length in (20, 9, 20):
            assert torch.allclose(made(u[..., :length]), made.reference(u[..., :length]), atol=1e-5)
        made.kernel.mul_(0.5)
        assert torch.allclose(made(u), made.reference(u), atol=1e-5)
        with torch.inference_mode():
            made(u)
        made.kernel.mul_(3.0)
        assert torch.allclose(made(u), made.reference(u), atol=1e-5)


@pytest.mark.parametrize(
    ("option", "value"), [("lam", 1.0), ("smoothing", "time"), ("smoothing", "frequency"), ("window", 3)]
)
def test_kept_spectra_follow_the_options(option, value):
    made, u = layer(lam=0.2, smoothing="time" if option == "window" else "none").eval(), torch.randn(2, 4, 20)
    with torch.no_grad():
        before = made(u)
        setattr(made, option, value)
        assert torch.allclose(made(u), made.reference(u), atol=1e-5) and not torch.allclose(made(u), before, atol=1e-3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_butterfly_layer_starts_as_a_long_convolution(bidirectional):
    made, butterfly = layer(bidirectional=bidirectional), ButterflyLongConv(4, 20, bidirectional=bidirectional)
    missing = butterfly.load_state_dict(made.state_dict(), strict=False).missing_keys
    assert all("block_fft" in name for name in missing)
    u = torch.randn(2, 4, 20)
    assert torch.allclose(butterfly(u), made(u), atol=1e-4)
    butterfly(u).square().sum().backward()
    assert butterfly.block_fft_u.mat_16.grad.any() and butterfly.block_fft_k.mat_4.grad.any()
    with torch.no_grad():
        butterfly.block_fft_u.mat_16.add_(0.3 * torch.randn(16, 16, 2))
    moved, base = butterfly.convolve(u.roll(1, -1)), butterfly.convolve(u).roll(1, -1)
    assert not torch.allclose(moved[..., 2:], base[..., 2:], atol=0.1), "no longer a convolution"


def test_the_operator_reads_rows():
    op, x = LongConv2d(4, (3, 5)), torch.randn(2, 4, 3, 5)
    assert torch.equal(op(x).flatten(2), op.layer(x.flatten(2)))
    with pytest.raises(BadInput, match=r"maps of 3x5, and this one is 3x4.*input_size=\(3, 4\)"):
        op(x[..., :4])


@pytest.mark.parametrize(
    ("name", "inputs", "classes", "taps", "lam", "kernel_dropout", "dropout", "norm"),
    [
        ("long_conv_lra_image", 1, 10, (2, 512, 1024), 0.003, 0.2, nn.Dropout1d(0.1), nn.LayerNorm),
        ("long_conv_pathfinder", 1, 2, (4, 256, 1024), 0.001, 0.3, nn.Dropout(0.0), nn.BatchNorm1d),
        ("long_conv_standalone_cifar", 3, 10, (4, 256, 1024), 0.001, 0.2, nn.Dropout(0.1), nn.LayerNorm),
    ],
)
def test_published_networks(name, inputs, classes, taps, lam, kernel_dropout, dropout, norm):
    net = opsin.create(name)
    for conv, behind, normed in zip(net.conv_layers, net.dropouts, net.norms, strict=True):
        assert (conv.lam, conv.kernel_drop.p, conv.smoothing) == (lam, kernel_dropout, "none")
        assert type(conv.dropout) is type(dropout) and conv.dropout.p == behind.p == dropout.p
        assert isinstance(normed, norm)
    assert len(net.conv_layers) == 6 and all(conv.kernel.shape == taps for conv in net.conv_layers)
    assert net.prenorm == (name == "long_conv_pathfinder")
    assert net.eval()(torch.randn(1, 64, inputs)).shape == (1, classes)


def test_order_of_norm_and_sum():
    x = torch.randn(2, 12, 3)
    for prenorm in (False, True):
        net = SequenceClassifier([LongConv(4, 12)], 3, 5, 4, prenorm=prenorm)
        with torch.no_grad():
            net.norms[0].weight.mul_(3.0)
        h = net.encoder(x).transpose(1, 2)
        norm = lambda t, n=net: F.layer_norm(t.transpose(1, 2), (4,), n.norms[0].weight).transpose(1, 2)  # noqa: E731
        h = h + net.conv_layers[0](norm(h)) if prenorm else norm(h + net.conv_layers[0](h))
        assert torch.allclose(net(x), net.decoder(h.mean(2)), atol=1e-5)
    last = SequenceClassifier([], 3, 5, 4, pool="last")
    assert torch.allclose(last(x), last.decoder(last.encoder(x[:, -1])), atol=1e-6)


def test_kernels_get_their_own_rate_and_no_decay():
    net = LongConvModel(1, 10, 8, depth=3, length=16)
    rest, kernels = parameter_groups(net, 0.01, 0.05, 0.002)
    assert {id(p) for p in kernels["params"]} == {id(layer.kernel) for layer in net.conv_layers}
    assert (kernels["lr"], kernels["weight_decay"], rest["lr"], rest["weight_decay"]) == (0.002, 0.0, 0.01, 0.05)
    assert len(rest["params"]) + 3 == len(list(net.parameters()))
    torch.optim.AdamW([rest, kernels])
    assert net.conv_layers[0].no_weight_decay() == ("kernel",)


def test_pixels_go_row_by_row():
    image = torch.arange(12.0).view(1, 2, 2, 3)
    assert pixels(image)[0].tolist() == [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]]


def test_complaints_are_sentences():
    with pytest.raises(BadInput, match=r"up to 20 positions.*length=21"):
        layer()(torch.randn(1, 4, 21))
    with pytest.raises(BadInput, match="window=4 is even"):
        LongConv(4, 20, smoothing="time", window=4)
    with pytest.raises(BadInput, match="'ones'"):
        LongConv(4, 20, init="ones")
    with pytest.raises(BadInput, match="'max'"):
        LongConvModel(pool="max", dim=4, depth=1, length=4)


@pytest.mark.parametrize("build", [partial(LongConv, smoothing="frequency"), ButterflyLongConv])
def test_training_under_autocast(build):
    layer, u = build(4, 16), torch.randn(2, 4, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(u)
    y.float().square().sum().backward()
    assert torch.allclose(y.float(), layer(u), atol=0.05) and torch.isfinite(u.grad).all()
