"""The claim of FlashFFTConv: convolutions by the Monarch decomposition are exact, and skip what need not be computed.

In float64 and float32, values and gradients, against torch.fft, for sizes of 256 to 32,768 and orders 2 and 3; padding
that is implied against padding that is there; partial and frequency-sparse convolutions against dense ones with the
masked kernel; products counted against 2 N sum(N_i). On a CUDA device the fused kernel is timed, too.
"""

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.spectral.flashfftconv import fft_conv, frequency_sparse_conv, kept_frequencies, partial_conv
from opsin.ops.spectral.monarch import best_factors, complex_flops, inverse, transform

ORDERS = {
    256: ((16, 16), (16, 4, 4)), 512: ((32, 16), (8, 8, 8)), 1024: ((32, 32), (16, 8, 8)),
    2048: ((64, 32), (16, 16, 8)), 4096: ((64, 64), (16, 16, 16)), 8192: ((128, 64), (32, 16, 16)),
    16384: ((128, 128), (32, 32, 16)), 32768: ((256, 128), (32, 32, 32)),
}  # fmt: skip


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


def worst_error(dtype: torch.dtype) -> tuple[float, float]:
    """The largest relative error of gated circular convolutions and of their gradients over sizes and orders."""
    values, gradients = [], []
    for n, choices in ORDERS.items():
        u, gate_in, gate_out, weight = (torch.randn(2, 2, n, dtype=dtype) for _ in range(4))
        k = torch.randn(2, n, dtype=dtype) / n**0.5
        variables = [t.requires_grad_() for t in (u, k, gate_in, gate_out)]
        plain = gate_out * torch.fft.irfft(torch.fft.rfft(gate_in * u) * torch.fft.rfft(k), n)
        expected = torch.autograd.grad((plain * weight).sum(), variables)
        for factors in choices:
            y = fft_conv(u, k, (gate_in, gate_out), causal=False, backend="monarch", factors=factors)
            values.append(relative(y, plain))
            found = torch.autograd.grad((y * weight).sum(), variables)
            gradients += [relative(a, b) for a, b in zip(found, expected, strict=True)]
    return max(values), max(gradients)


class Calls(nn.Module):
    """A function as a network, so that its products can be counted."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def products(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Real multiply-adds of the products that were run."""
    return count_macs(Calls(function), x)


def counts(experiment: Experiment) -> None:
    """Real multiply-adds over complex operations: a complex multiply-add is two operations and four real ones."""
    ratios = []
    for n, choices in ORDERS.items():
        for factors in choices:
            x = torch.randn(1, 2 * n)
            counted = products(lambda z, f=factors: torch.cat(transform(z.chunk(2, -1), f)), x)
            ratios.append(counted / 2 / complex_flops(factors))
    experiment.check("counted over 2 N sum(N_i), all sizes and orders, least", min(ratios), "==", 1.0)
    experiment.check("counted over 2 N sum(N_i), all sizes and orders, most", max(ratios), "==", 1.0)
    factors, x = (32, 32), torch.randn(1, 2048)
    full = products(lambda z: torch.cat(transform(z.chunk(2, -1), factors)), x)
    for kept in (24, 16, 8):
        part = products(lambda z, c=kept: torch.cat(transform(z.chunk(2, -1), factors, (32, c))), x)
        wanted = (1 + kept / 32) / 2  # all of the first factor's products, and a part of the second's
        experiment.check(
            f"products with {kept} of 32 blocks, over what is proportional", part / full / wanted, "==", 1.0
        )
    half = products(lambda z: inverse(transform((z, None), factors), factors, 512)[0], x[:, :512])
    whole = products(lambda z: inverse(transform((z, None), factors), factors)[0], x[:, :1024])
    experiment.record("products of a convolution's transforms with implicit padding over explicit", half / whole)


def sparse_forms(experiment: Experiment) -> None:
    u, k = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 2048), (3, 2048)))
    padded = fft_conv(F.pad(u, (0, 2048)), F.pad(k, (0, 2048)), causal=False, backend="monarch")[..., :2048]
    implied = fft_conv(u, k, backend="monarch")
    experiment.check("implicit padding against explicit padding", relative(implied, padded), "<", 1e-10)
    masked = k * (torch.arange(2048) < 200)
    dense = torch.fft.irfft(torch.fft.rfft(u, 4096) * torch.fft.rfft(masked, 4096))[..., :2048]
    error = relative(partial_conv(u, k, 200), dense)
    experiment.check("partial convolution against the masked kernel", error, "<", 1e-10)
    errors = []
    for factors, keep in (((64, 64), (64, 8)), ((64, 64), (16, 64)), ((16, 16, 16), (16, 5, 3))):
        order = kept_frequencies(factors, keep)[0]
        mask = torch.zeros(4096)
        mask[order] = mask[-order % 4096] = 1
        dense = torch.fft.ifft(torch.fft.fft(u, 4096) * torch.fft.fft(k, 4096) * mask).real[..., :2048]
        errors.append(relative(frequency_sparse_conv(u, k, keep, factors), dense))
    experiment.check("frequency-sparse convolution against the masked spectrum", max(errors), "<", 1e-10)
    k_f = torch.fft.rfft(k, 4096)
    k_f[..., 512:] = 0
    low = torch.fft.irfft(torch.fft.rfft(u, 4096) * k_f)[..., :2048]
    error = relative(frequency_sparse_conv(u, k, (64, 8), (64, 64)), low)
    experiment.check("low-pass corner against bins from 512 on set to zero", error, "<", 1e-10)


def on_device(experiment: Experiment) -> str:
    """Times the fused kernel in bfloat16 against torch.fft; says so where there is no device."""
    if not torch.cuda.is_available():
        return "No CUDA device: the fused kernel was run in Triton's interpreter only (tests), and no speed is claimed"
    for n in (1024, 2048, 4096):
        u, gate_in, gate_out = (torch.randn(64, 768, n, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        k = torch.randn(768, n, device="cuda") / n**0.5

        fused = partial(fft_conv, u, k, (gate_in, gate_out), causal=False, backend="triton")
        plain = partial(composed, u, k, gate_in, gate_out)
        experiment.check(f"fused kernel at {n}, relative error", relative(fused().float(), plain().float()), "<", 1e-2)
        ratio = _milliseconds(plain) / _milliseconds(fused)
        experiment.check(f"time of torch.fft over the fused kernel's at {n}", ratio, ">=", 1.5)
    return f"Timed on {torch.cuda.get_device_name()}"


def composed(u: Tensor, k: Tensor, gate_in: Tensor, gate_out: Tensor) -> Tensor:
    """The gated circular convolution by torch.fft."""
    y_f = torch.fft.rfft((gate_in * u).float()) * torch.fft.rfft(k)
    return gate_out * torch.fft.irfft(y_f, u.shape[-1]).to(u.dtype)


def _milliseconds(function: Callable[[], Tensor]) -> float:
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def run(budget: ClaimBudget) -> Evidence:
    torch.manual_seed(0)
    experiment = Experiment(
        "flashfftconv",
        "FFT convolutions by small matrix products are exact at all sizes, and skipped blocks cost nothing.",
        data="normal random signals, 256 to 32,768 positions", baseline="torch.fft",
    )  # fmt: skip
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        for what, error in zip(("values", "gradients"), worst_error(dtype), strict=True):
            experiment.check(f"Monarch against torch.fft, {dtype}, {what} (worst relative error)", error, "<", limit)
    counts(experiment)
    sparse_forms(experiment)
    experiment.record("factors that the cost model takes", {n: list(best_factors(n)) for n in ORDERS})
    return experiment.evidence(budget, on_device(experiment))
