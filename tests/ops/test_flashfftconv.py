"""FlashFFTConv: every backend against the direct sum, padding, sparse forms, what is saved, and the fused kernel."""

import copy
from collections.abc import Callable
from math import prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import opsin
from opsin.catalog import card_of
from opsin.errors import BadInput
from opsin.ops.spectral import flashfftconv, fourier
from opsin.ops.spectral.flashfftconv import (
    FlashFFTConv,
    GlobalFilter1d,
    Monarch,
    ShortConv1d,
    fft_conv,
    frequency_sparse_conv,
    kept_frequencies,
    partial_conv,
)
from opsin.ops.spectral.fourier import (
    Fourier,
    LongConvolution,
    fast_length,
    filtered,
    long_conv,
    needed_length,
    reference_conv,
    response,
)  # fmt: skip


def direct(u: Tensor, k: Tensor, start: int = 0) -> Tensor:
    """The sum of the definition, by conv1d with the flipped kernel."""
    taps = k.shape[-1]
    padded = F.pad(u, (taps - 1 - start, start))
    return F.conv1d(padded, k.flip(-1)[:, None], groups=len(k))


def signals(*lengths: int, b: int = 3, h: int = 2) -> tuple[Tensor, ...]:
    u = torch.randn(b, h, lengths[0], dtype=torch.float64)
    return u, *(torch.randn(h, t, dtype=torch.float64) for t in lengths[1:])


@pytest.mark.parametrize("backend", ["auto", "fft", "monarch"])
@pytest.mark.parametrize(("length", "taps", "start"), [(7, 7, 0), (64, 64, 0), (63, 125, 62), (50, 13, 6), (16, 1, 0)])
def test_every_backend_is_the_direct_sum(backend, length, taps, start):
    u, k = signals(length, taps)
    assert torch.allclose(fft_conv(u, k, backend=backend, start=start), direct(u, k, start), atol=1e-11)


def test_reference_is_the_direct_sum():
    u, k = torch.randn(2, 3, 21), torch.randn(3, 41)
    assert torch.allclose(reference_conv(u, k, 20), direct(u, k, 20), atol=1e-5)


@pytest.mark.parametrize(("backend", "factors"), [("fft", None), ("monarch", None), ("monarch", (4, 2, 6))])
def test_circular_convolution_wraps(backend, factors):
    u, k = signals(48, 20)
    ours = fft_conv(u, k, causal=False, backend=backend, factors=factors and list(factors))  # any sequence
    wrapped = direct(u.repeat(1, 1, 2), k)[..., 48:]
    assert torch.allclose(ours, wrapped, atol=1e-11)
    assert not torch.allclose(ours, direct(u, k))


def test_a_causal_output_does_not_see_the_future():
    u, k = signals(30, 30)
    later = u.clone()
    later[..., 20:] += 1.0
    for backend in ("fft", "monarch"):
        changed = (fft_conv(later, k, backend=backend) - fft_conv(u, k, backend=backend)).abs().amax((0, 1)) > 1e-9
        assert not changed[:20].any() and changed[20:].all()
    wrapped = fft_conv(later, k, causal=False) - fft_conv(u, k, causal=False)
    assert wrapped.abs().amax((0, 1))[:20].min() > 1e-3, "without padding to 2L it does"


@pytest.mark.parametrize("backend", ["fft", "monarch"])
@pytest.mark.parametrize(("causal", "start"), [(True, 0), (True, 3), (False, 0)])
def test_gradients_with_gates(backend, causal, start):
    u, k = (t.requires_grad_() for t in signals(9, 8, b=2))
    gates = [torch.randn(2, 2, 9, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def function(*t: Tensor) -> Tensor:
        return fft_conv(t[0], t[1], (t[2], t[3]), causal=causal, backend=backend, start=start)

    if causal or backend == "fft":
        assert torch.autograd.gradcheck(function, (u, k, *gates))
    plain = gates[1] * fft_conv(gates[0] * u, k, causal=causal, start=start)
    assert torch.allclose(function(u, k, *gates), plain, atol=1e-12)


def test_gradients_of_several_kernels():
    u = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: long_conv(a[:, None], b, 6), (u, k))
    assert torch.autograd.gradcheck(lambda a, b: filtered(a, b, 6, 20), (u, k[0].detach().requires_grad_()))


def saved(run: Callable[[], Tensor]) -> list[Tensor]:
    """What autograd keeps."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


@pytest.mark.parametrize("engine", [Fourier(), Monarch()], ids=["fft", "monarch"])
def test_backward_keeps_the_arguments_only(engine):
    u, k = torch.randn(2, 4, 100, requires_grad=True), torch.randn(4, 60, requires_grad=True)
    gate = torch.randn(2, 4, 100, requires_grad=True)
    kept = saved(lambda: LongConvolution.apply(u, k, gate, None, 0, 200, engine))
    assert {u.data_ptr(), gate.data_ptr()} <= {t.data_ptr() for t in kept} and len(kept) == 3


def test_on_a_cpu_the_two_spectra_are_kept_and_nothing_else():
    u, k = torch.randn(2, 4, 100, requires_grad=True), torch.randn(4, 60, requires_grad=True)
    assert [t.shape for t in saved(lambda: fft_conv(u, k))] == [(2, 4, 81), (4, 81)]


def test_gradients_without_kept_spectra():
    """What accelerators take, with gates, against what a CPU takes."""
    u, gate_in, gate_out = (torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True) for _ in range(3))
    k = torch.randn(3, 13, dtype=torch.float64, requires_grad=True)
    inputs = (u, k, gate_in, gate_out)
    assert torch.autograd.gradcheck(lambda *a: LongConvolution.apply(*a, 6, 20, Fourier()), inputs)
    frugal = LongConvolution.apply(*inputs, 6, 20, Fourier())
    quick = long_conv(u, k, 6, 20, (gate_in, gate_out))
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (frugal, quick)), strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def test_sizes_are_fast_and_large_enough():
    assert [fast_length(n) for n in (1, 2, 3, 13, 97, 391, 2048, 2049)] == [2, 2, 4, 14, 98, 392, 2048, 2058]
    assert needed_length(100, 100, 0) == needed_length(100, 199, 99) == 199
    for length, taps, start in ((10, 10, 0), (10, 19, 9), (10, 4, 1), (5, 30, 2)):
        u, k = signals(length, taps)
        n = needed_length(length, taps, start)
        assert torch.allclose(long_conv(u, k, start, n), direct(u, k, start)[..., :length], atol=1e-11)


@pytest.mark.parametrize("kernels", [(), (3,)])
@pytest.mark.parametrize("features", [1, 3, 7])
def test_blocks_of_features_are_all_features(features, kernels, monkeypatch):
    """The cache of a CPU bounds how many are transformed at once; 7 features do not always divide."""
    u, *gates = torch.randn(3, 2, *(1 for _ in kernels), 7, 50)
    k, n = torch.randn(*kernels, 7, 50), fast_length(99)
    sizes = []
    run = torch.fft.irfft
    monkeypatch.setattr(fourier, "irfft", lambda y, *given, **how: sizes.append(y.shape[-2]) or run(y, *given, **how))
    with torch.no_grad():
        whole = filtered(u, k, 0, n, tuple(gates))
        monkeypatch.setattr(fourier, "BLOCK", features * 2 * prod(kernels) * 4 * n // torch.get_num_threads() + 4)
        assert torch.allclose(filtered(u, k, 0, n, tuple(gates)), whole, atol=1e-6)
        assert torch.allclose(filtered(u, response(k, n), 0, n, tuple(gates)), whole, atol=1e-6)
    pieces = [features] * (7 // features) + [7 % features] * (7 % features > 0)
    assert sizes == [7, *pieces, *pieces]


def test_what_is_convolved_with_kept_kernels_may_require_gradients(monkeypatch):
    u, k = (torch.randn(*shape, 7, 50, dtype=torch.float64) for shape in ((2,), ()))
    u.requires_grad_()
    n = fast_length(99)

    def gradient(run: Callable[[], Tensor]) -> Tensor:
        return torch.autograd.grad(run().square().sum(), u)[0]

    expected = gradient(lambda: u.cos() * direct(u.sin() * u, k)[..., :50])
    for block in (fourier.BLOCK, 2 * 2 * 4 * n):
        monkeypatch.setattr(fourier, "BLOCK", block)
        assert torch.allclose(gradient(lambda: filtered(u, k, 0, n, (u.sin(), u.cos()))), expected)


def test_gates_of_a_wider_type_widen_the_result(monkeypatch):
    u, k, gates = torch.randn(2, 7, 50).bfloat16(), torch.randn(7, 50), (None, torch.randn(2, 7, 50))
    with torch.no_grad():
        expected = gates[1] * filtered(u, k, 0, fast_length(99))
        for block in (fourier.BLOCK, 2 * 2 * 4 * fast_length(99)):
            monkeypatch.setattr(fourier, "BLOCK", block)
            found = filtered(u, k, 0, fast_length(99), gates)
            assert found.dtype == torch.float32 and torch.equal(found, expected)
            assert filtered(u, k, 0, fast_length(99), gates[::-1]).dtype == torch.float32


@pytest.mark.parametrize("backend", ["fft", "monarch", "triton"])
@pytest.mark.parametrize("place", [0, 1])
def test_the_type_of_the_result_does_not_depend_on_gradients(backend, place):
    if backend == "triton":
        pytest.importorskip("triton")
    u, k = torch.randn(2, 1, 128).bfloat16(), torch.randn(1, 128, requires_grad=True)
    gates = [None, None]
    gates[place] = torch.randn(2, 1, 128)
    exact = [1 if gate is None else gate for gate in gates]
    expected = exact[1] * direct(exact[0] * u.float(), k)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y = fft_conv(u, k, tuple(gates), backend=backend)
            assert y.dtype == torch.float32 and (y - expected).norm() < 1e-2 * expected.norm()
            assert fft_conv(u, k, backend=backend).dtype == torch.bfloat16


def test_implicit_padding_is_explicit_padding_for_less():
    u, k = signals(512, 512)
    padded = [F.pad(t, (0, 512)) for t in (u, k)]

    def implied() -> Tensor:
        return fft_conv(u, k, backend="monarch")

    def explicit() -> Tensor:
        return fft_conv(*padded, causal=False, backend="monarch")[..., :512]

    assert torch.allclose(implied(), explicit(), atol=1e-12)
    counts = []
    for function in (implied, explicit):
        with FlopCounterMode(display=False) as counter:
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] < 0.8 * counts[1]


@pytest.mark.parametrize("length", [40, 400, 1000])
def test_partial_convolution_is_the_masked_kernel(length):
    u, k = signals(length, length)
    masked = k * (torch.arange(length) < 24)
    assert torch.allclose(partial_conv(u, k, 24), direct(u, masked), atol=1e-11)


def test_partial_convolution_of_a_longer_input():
    u, k = signals(1000, 30)
    assert torch.allclose(partial_conv(u, k, 30), direct(u, k), atol=1e-11)


@pytest.mark.parametrize(
    ("taps", "length", "size"), [(1, 600, 256), (64, 1000, 256), (97, 3000, 512), (1021, 9000, 4096)]
)
@pytest.mark.parametrize("backend", ["fft", "monarch"])
def test_pieces_of_a_partial_convolution_have_powers_of_two_and_a_bound(taps, length, size, backend, monkeypatch):
    """4 * 97 has a factor that no small matrix does and 4 * 1021 one that FFTs are slow at."""
    u, k = signals(length, taps)
    shapes, run = [], flashfftconv.fft_conv

    def spied(u: Tensor, k: Tensor, **options: object) -> Tensor:
        shapes.append(tuple(u.shape))
        return run(u, k, **options)

    monkeypatch.setattr(flashfftconv, "fft_conv", spied)
    monkeypatch.setattr(flashfftconv, "PIECES", 2 * u[..., 0].numel() * size)
    assert torch.allclose(partial_conv(u, k, taps, backend), direct(u, k), atol=1e-10)
    count = -(-length // (size - taps + 1))
    assert shapes == [(6, 2, size)] * (count // 2) + [(3, 2, size)] * (count % 2)


def test_gradients_of_a_partial_convolution():
    u, k = (t.requires_grad_() for t in signals(520, 5, b=1, h=1))
    weight = torch.randn(520, dtype=torch.float64)
    both = [torch.autograd.grad((y * weight).sum(), (u, k)) for y in (partial_conv(u, k, 5), direct(u, k))]
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize(("factors", "keep"), [((16, 16), (16, 4)), ((16, 16), (5, 16)), ((8, 8, 4), (8, 3, 2))])
def test_frequency_sparse_convolution_is_the_masked_spectrum(factors, keep):
    n = prod(factors)
    u, k = signals(n // 2, n // 2)
    order, _ = kept_frequencies(factors, keep)
    mask = torch.zeros(n)
    mask[order] = mask[-order % n] = 1
    dense = torch.fft.ifft(torch.fft.fft(u, n) * torch.fft.fft(k, n) * mask).real[..., : n // 2]
    assert torch.allclose(frequency_sparse_conv(u, k, keep, factors), dense, atol=1e-11)


def test_low_corner_is_the_published_low_pass():
    """flash-fft-conv's definition: bins from N_partial // 2 on of the rfft are zero."""
    u, k = signals(128, 128)
    k_f = torch.fft.rfft(k, 256)
    k_f[..., 64:] = 0
    expected = torch.fft.irfft(torch.fft.rfft(u, 256) * k_f)[..., :128]
    assert torch.allclose(frequency_sparse_conv(u, k, (16, 4), (16, 16)), expected, atol=1e-11)


def test_skipped_blocks_are_not_multiplied():
    u, k = signals(512, 512)
    counts = []
    for kept in (32, 16, 8):
        with FlopCounterMode(display=False) as counter:
            frequency_sparse_conv(u, k, (32, kept), (32, 32))
        counts.append(counter.get_total_flops())
    full, half, quarter = counts
    assert half == full - 2 * (half - quarter) and quarter < half < full


def test_kept_spectra_follow_the_kernel():
    op, x = FlashFFTConv(4, (6, 5)).eval(), torch.randn(2, 4, 6, 5)

    def current() -> bool:
        with torch.no_grad():
            return bool(torch.allclose(op(x), op.reference(x), atol=1e-5))

    assert current() and op.layer._kept.value is not None
    made = op.layer._kept.value
    with torch.no_grad():
        op(x)
    assert op.layer._kept.value is made, "computed once"
    with torch.no_grad():
        op.layer.weight.mul_(2.0)
    assert current() and op.layer._kept.value is not made
    op.load_state_dict(FlashFFTConv(4, (6, 5)).state_dict())
    assert current()
    op.layer.weight = nn.Parameter(torch.randn_like(op.layer.weight))
    assert current()
    op.layer.weight.data = torch.randn_like(op.layer.weight)
    assert current()
    twin = copy.deepcopy(op).bfloat16()
    with torch.no_grad():
        assert torch.allclose(twin(x.bfloat16()).float(), op(x), atol=0.2)
    assert not any("kept" in name for name in op.state_dict())
    op(x.requires_grad_()).sum().backward()
    assert op.layer.weight.grad is not None


@pytest.mark.parametrize("gated", [False, True])
def test_the_operator_is_a_sum_over_the_raster(gated):
    op, x = FlashFFTConv(3, (4, 5), gated=gated).eval(), torch.randn(2, 3, 4, 5)
    u = x.flatten(2)
    gates = op.layer.gates(u).chunk(2, 1) if gated else (1.0, 1.0)
    expected = gates[1] * direct(gates[0] * u, op.layer.weight, 19)
    for mode in (True, False):
        op.train(mode)
        assert torch.allclose(op(x).flatten(2), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(op(x).flatten(2), expected, atol=1e-5)


def test_published_lengths_build():
    with torch.device("meta"):
        assert opsin.create("gated_conv_h100_1m").layer.length == 2**20
    op = opsin.create("gated_conv_h100_1k", dim=4)
    assert op(torch.randn(1, 4, 1, 1024)).shape == (1, 4, 1, 1024) and op.layer.gates is not None


def test_a_filter_says_how_long_its_input_may_be():
    made = GlobalFilter1d(4, 16)
    for mode in (True, False):
        made.train(mode)
        with torch.no_grad():
            for length in (16, 9):
                u = torch.randn(2, 4, length)
                assert torch.allclose(made(u), direct(u, made.weight, 15), atol=1e-5)
            for shape in ((2, 4, 20), (2, 1, 16)):
                with pytest.raises(BadInput, match=r"\(batch, 4, up to 16 positions\)"):
                    made(torch.randn(shape))


def test_the_card_counts_parameters():
    taps, gates = card_of("flashfftconv").facts["parameters"].split(" taps; gates add ")
    names = {"C": 6, "N": 15}
    for gated in (False, True):
        op = FlashFFTConv(6, (3, 5), gated=gated)
        assert sum(p.numel() for p in op.parameters()) == eval(taps, names) + gated * eval(gates, names)


def test_short_convolution():
    conv, u = ShortConv1d(3, 5), torch.randn(2, 3, 11)
    expected = direct(u, conv.weight.flip(-1), 2) + conv.bias[:, None]
    assert torch.allclose(conv(u), expected, atol=1e-6)
    with pytest.raises(BadInput, match="kernel_size=4 is even"):
        ShortConv1d(3, 4)


def test_complaints_are_sentences():
    u, k = torch.randn(1, 2, 8), torch.randn(2, 8)
    with pytest.raises(BadInput, match=r"takes u .* and k .*\(3, 8\)"):
        fft_conv(u, torch.randn(3, 8))
    with pytest.raises(BadInput, match="at most as many taps, not 9"):
        fft_conv(u, torch.randn(2, 9), causal=False)
    with pytest.raises(BadInput, match="a gate has the shape of the input"):
        fft_conv(u, k, (u[..., :4], None))
    with pytest.raises(BadInput, match="not 'cuda'"):
        fft_conv(u, k, backend="cuda")
    with pytest.raises(BadInput, match="size 8, and this convolution needs 15"):
        fft_conv(u, k, backend="monarch", factors=(4, 2))
    with pytest.raises(BadInput, match=r"maps of 4x5, and this one is 5x4.*input_size=\(5, 4\)"):
        FlashFFTConv(3, (4, 5))(torch.randn(1, 3, 5, 4))
    for keep in ((4, 4), (0, 4), (4, 0), (-1, 2)):
        with pytest.raises(BadInput, match="does not fit a convolution of 8"):
            frequency_sparse_conv(u, k, keep, (4, 4) if 0 in keep else (4, 2))
    for start in (-3, 8):
        with pytest.raises(BadInput, match=f"from 0 to 7, not {start}"):
            fft_conv(u, k, start=start)
    with pytest.raises(BadInput, match="has start=0, not 5"):
        fft_conv(u, k, causal=False, start=5)
    with pytest.raises(BadInput, match="at least one tap, and this one has none"):
        fft_conv(u, k[:, :0])
    for taps in (0, -1):
        with pytest.raises(BadInput, match=f"taps={taps}.* at least one"):
            partial_conv(u, k, taps)
    with pytest.raises(BadInput, match=r"no use for factors=\(4, 4\)"):
        fft_conv(u, k, backend="fft", factors=(4, 4))


@pytest.mark.parametrize(
    ("length", "causal", "start", "factors"),
    [
        (256, False, 0, None), (1024, False, 0, None), (4096, False, 0, None), (1024, True, 0, None),
        (200, True, 0, None), (130, True, 129, None), (2000, True, 0, (16, 16, 16)),
    ],
)  # fmt: skip
def test_fused_kernel_in_values_and_gradients(length, causal, start, factors):
    """Orders 2 and 3, an odd number of samples, gates, against torch.fft."""
    pytest.importorskip("triton")
    taps = length + start
    k = (torch.randn(1, taps) / taps**0.5).requires_grad_()
    u, *gates = (torch.randn(3, 1, length, requires_grad=True) for _ in range(3))
    weight, results = torch.randn(3, 1, length), []
    for backend in ("fft", "triton"):
        factors_of = factors if backend == "triton" else None
        y = fft_conv(u, k, tuple(gates), causal=causal, backend=backend, start=start, factors=factors_of)
        results.append((y, *torch.autograd.grad((y * weight).sum(), [u, k, *gates])))
    for plain, fused in zip(*results, strict=True):
        assert (fused - plain).norm() / plain.norm() < 1e-5 and torch.allclose(fused, plain, atol=1e-4, rtol=1e-4)


def test_fused_kernel_refuses_what_it_cannot():
    pytest.importorskip("triton")
    u, k = torch.randn(1, 1, 300), torch.randn(1, 300)
    with pytest.raises(BadInput, match="no fused kernel for a transform of size 300"):
        fft_conv(u, k, causal=False, backend="triton")
    with pytest.raises(BadInput, match="powers of 2 from 16 on"):
        fft_conv(u, k, backend="triton", factors=(128, 8))


def test_the_fused_kernel_has_no_float64(monkeypatch):
    triton = pytest.importorskip("opsin.ops.spectral.flashfftconv_triton")
    types = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    assert [triton._precision(torch.empty(1, dtype=t)) for t in types] == ["ieee", "ieee", "tf32", "tf32"]
    u, k = torch.randn(2, 1, 128), torch.randn(1, 128)
    for arguments in ((u.double(), k), (u, k.double()), (u, k, (u.double(), None)), (u, k, (None, u.double()))):
        with pytest.raises(BadInput, match="float32 at most"):
            fft_conv(*arguments, backend="triton")
    planned, engine = [], SimpleNamespace(convolve=lambda u, *_: u)
    monkeypatch.setattr(flashfftconv, "_plan", lambda *given: planned.append(given[-1]) or (engine, 256))
    monkeypatch.setattr(flashfftconv, "kernel_wanted", lambda u: True)
    with FakeTensorMode(), torch.no_grad():
        for dtype in types:
            fft_conv(torch.empty(2, 1, 128, device="cuda", dtype=dtype), torch.empty(1, 128, device="cuda"))
    assert [device is not None for device in planned] == [False, True, True, True]
