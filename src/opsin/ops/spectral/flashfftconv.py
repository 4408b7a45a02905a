"""FlashFFTConv: long convolutions that run as small matrix products, exactly.

Fu et al. 2023, "FlashFFTConv: Efficient Convolutions for Long Sequences with Tensor Cores", arXiv:2311.05908. An FFT
convolution spends its time on memory traffic and leaves matrix units idle. Written in Monarch form (see `monarch.py`)
the transforms are products with small matrices, the spectra need no sorting, and transform, product and inverse fit
into one kernel, gates included:

    y = gate_out * (k conv (gate_in * u))

Zeros are not computed with: padding is implicit, a partial convolution keeps the first taps, and a frequency-sparse one
multiplies with corners of the matrices only (section 3.3).
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.kept import Kept, may_keep
from opsin.ops.kernels import kernel_wanted, require_kernel
from opsin.ops.spectral.fourier import (
    FOURIER,
    Engine,
    Gates,
    computing,
    fast_length,
    filtered,
    gated,
    gated_type,
    long_conv,
    needed_length,
    reference_conv,
    response,
)  # fmt: skip
from opsin.ops.spectral.monarch import Pair, best_factors, complex_product, conjugate, inverse, permutation, transform
from opsin.ops.spectral.sequence import RasterOperator

Backend = Literal["auto", "fft", "monarch", "triton"]
PIECES = 2**20  # numbers that a CPU transforms at once in a partial convolution of a long input; others 16 times more


class Monarch:
    """The engine of the decomposition; `factors` None lets the cost model choose."""

    def __init__(self, factors: tuple[int, ...] | None = None):
        self.factors = factors

    def convolve(self, u: Tensor, k: Tensor, start: int, n: int, gates: Gates = (None, None)) -> Tensor:
        y_f = complex_product(self._spectrum(gated(u, gates[0]), n), self._spectrum(k, n))
        y = gated(self._back(y_f, n, start + u.shape[-1])[..., start:], gates[1])
        return y.to(gated_type(u, gates))

    def adjoint(self, u: Tensor, k: Tensor, grad: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
        grad_f = self._spectrum(F.pad(grad, (start, 0)), n)
        u_f, k_f = self._spectrum(u, n), self._spectrum(k, n)
        into = [(u, complex_product(grad_f, conjugate(k_f))), (k, complex_product(grad_f, conjugate(u_f)))]
        into_u, into_k = (
            self._back((re.sum_to_size(*x.shape[:-1], n), im.sum_to_size(*x.shape[:-1], n)), n, x.shape[-1])
            for x, (re, im) in into
        )
        return into_u, into_k

    def _spectrum(self, x: Tensor, n: int) -> Pair:
        return transform((x.to(computing(x.dtype)), None), self._factors(n))

    def _back(self, x: Pair, n: int, length: int) -> Tensor:
        return inverse(x, self._factors(n), length)[0]

    def _factors(self, n: int) -> tuple[int, ...]:
        return self.factors or best_factors(n)


def fft_conv(
    u: Float[Tensor, "b h l"], k: Float[Tensor, "h t"], gates: Gates = (None, None), causal: bool = True,
    backend: Backend = "auto", factors: Sequence[int] | None = None, start: int = 0,
) -> Float[Tensor, "b h l"]:  # fmt: skip
    """gate_out * (k conv (gate_in * u)), one kernel per feature.

    causal: a linear convolution, as if u were padded with zeros; else circular, of the size of u.
    gates: (gate_in, gate_out), each like u or None; the result is of the widest type of u and these.
    backend: "fft" (torch.fft), "monarch" (matrix products), "triton" (those in one CUDA kernel, in float32 at most), or
        "auto": the Triton kernel on CUDA tensors where it has the size and nothing is float64, else "fft".
    factors: of the Monarch form, whose product is the transform's size; the cost model chooses if left out. "auto"
        gives them to the Triton kernel, and has no use for them where it takes "fft".
    start: taps with negative lags that k begins with; L - 1 for a kernel of 2L - 1 that looks both ways.
    Backward keeps the arguments only and computes the spectra again, but for "fft" on a CPU. Raises BadInput: shapes
    that do not fit, a kernel longer than a circular convolution, a start outside the taps or in a circular convolution,
    an unknown backend, one that cannot run here, or factors for one that has none.
    """
    if gates[0] is not None or gates[1] is not None:
        _fitting(u, gates)
    if backend == "triton":
        require_kernel(u)
        if _double(u, k, *gates):
            raise BadInput("the fused kernel computes in float32 at most; take another backend for float64")
    cuda = u.device if u.is_cuda and (backend == "triton" or _wanted(u, k, *gates)) else None
    plan = _plan.__wrapped__ if is_compiling() else _plan  # symbolic sizes cannot be kept
    engine, n = plan(u.shape, k.shape, causal, backend, tuple(factors) if factors else None, start, cuda)
    return long_conv(u, k, start, n, gates, engine)


def _fitting(u: Tensor, gates: Gates) -> None:
    """Raises BadInput for a gate that has not the shape of the input."""
    for gate in gates:
        if gate is not None and gate.shape != u.shape:
            raise BadInput(f"a gate has the shape of the input, {tuple(u.shape)}, not {tuple(gate.shape)}")


def _double(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.dtype == torch.float64 for t in tensors)


def _wanted(u: Tensor, *others: Tensor | None) -> bool:
    """Whether "auto" takes the fused kernel, which has no float64."""
    return kernel_wanted(u) and not _double(u, *others)


@lru_cache(maxsize=256)
def _plan(
    size: torch.Size, kernel: torch.Size, causal: bool, backend: Backend, factors: tuple[int, ...] | None, start: int,
    cuda: torch.device | None,
) -> tuple[Engine, int]:  # fmt: skip
    """What computes, and the size of the transform: free above the needed one for padded convolutions.

    cuda: the device if the fused kernel can run on it. Kept, as finding out takes as long as a short transform. Raises
    BadInput where the shapes do not fit.
    """
    if len(size) != 3 or len(kernel) != 2 or size[1] != kernel[0]:
        shapes = f"{tuple(size)} and {tuple(kernel)}"
        raise BadInput(f"fft_conv takes u (batch, features, length) and k (features, taps), not {shapes}")
    if not causal and kernel[1] > size[2]:
        raise BadInput(f"a circular convolution of {size[2]} positions has at most as many taps, not {kernel[1]}")
    if kernel[1] < 1:
        raise BadInput("a kernel has at least one tap, and this one has none")
    if not 0 <= start < kernel[1]:
        raise BadInput(f"start is the place of lag 0 in the kernel, from 0 to {kernel[1] - 1}, not {start}")
    if start and not causal:
        raise BadInput(f"a circular convolution has start=0, not {start}; roll its output instead")
    if factors and backend == "fft":
        raise BadInput(f"backend='fft' has no use for factors={factors}; take backend='monarch'")
    if backend not in ("auto", "fft", "monarch", "triton"):
        raise BadInput(f"the backend is auto, fft, monarch or triton, not {backend!r}")
    needed = needed_length(size[2], kernel[1], start) if causal else size[2]
    free = fast_length(needed) if causal else needed
    if factors is None and (backend == "fft" or (backend == "auto" and cuda is None)):
        return FOURIER, free
    n = prod(factors) if factors else 1 << max(8, (needed - 1).bit_length()) if causal else needed
    if n < needed or (n > needed and not causal):
        raise BadInput(f"the factors {factors} make a transform of size {n}, and this convolution needs {needed}")
    if backend == "triton" or (backend == "auto" and cuda):
        from opsin.ops.spectral.flashfftconv_triton import FusedMonarch, fused_factors

        if (chosen := factors or fused_factors(n, cuda)) is not None:
            return FusedMonarch(chosen), n
        if backend == "triton":
            raise BadInput(f"there is no fused kernel for a transform of size {n} on this device; take backend='fft'")
    if backend == "monarch":
        return Monarch(factors), n
    return FOURIER, free


def partial_conv(
    u: Float[Tensor, "b h l"], k: Float[Tensor, "h t"], taps: int, backend: Backend = "auto"
) -> Float[Tensor, "b h l"]:  # fmt: skip
    """The causal convolution with the first `taps` taps only; inputs may be longer than the kernel (section 3.3).

    An input that is several times as long is cut into pieces with overlaps (overlap-save), a bounded number of which
    are transformed at once: spectra are of the kernel's size and, without gradients, nothing grows with the input but
    copies of it and of the output. Raises BadInput: less than one tap, and what `fft_conv` raises.
    """
    if taps < 1:
        raise BadInput(f"taps={taps}: a partial convolution keeps at least one tap")
    k, length = k[:, :taps], u.shape[-1]
    size = 1 << max(8, (4 * k.shape[-1] - 1).bit_length())
    if length <= 2 * size:
        return fft_conv(u, k, backend=backend)
    history, hop = k.shape[-1] - 1, size - k.shape[-1] + 1
    pieces = F.pad(u, (history, -length % hop)).unfold(-1, size, hop).movedim(2, 1)  # (b, pieces, h, size)
    done = []
    most = PIECES * (1 if u.is_cpu else 16)
    for some in pieces.split(max(1, most // (len(u) * len(k) * size)), 1):
        y = fft_conv(some.flatten(0, 1), k, causal=False, backend=backend)[..., history:]
        done.append(y.unflatten(0, (-1, some.shape[1])).movedim(1, 2).flatten(2))
    return torch.cat(done, -1)[..., :length]


def frequency_sparse_conv(
    u: Float[Tensor, "b h l"], k: Float[Tensor, "h t"], keep: Sequence[int], factors: Sequence[int]
) -> Float[Tensor, "b h l"]:  # fmt: skip
    """The causal convolution with a kernel whose spectrum is zero outside a corner of the Monarch index (section 3.3).

    keep: how many of each factor's frequencies stay, at least one, lowest first; only these rows of its matrix are
        multiplied. A real signal has every frequency twice, as k and N - k: where one of the two is kept, both count.
    factors: sizes whose product is at least the padded length. Raises BadInput where they do not fit.
    """
    factors, keep = tuple(factors), tuple(keep)
    n = prod(factors)
    if (
        n < u.shape[-1] + k.shape[-1] - 1
        or len(keep) != len(factors)
        or any(not 0 < a <= b for a, b in zip(keep, factors))
    ):
        raise BadInput(f"keep={keep} of factors={factors} does not fit a convolution of {u.shape[-1]} positions")
    weight = (1 + ~kept_frequencies(factors, keep)[1]).to(u.device)
    u_f, k_f = (transform((x.to(computing(x.dtype)), None), factors, keep) for x in (u, k))
    y_f = complex_product(u_f, (k_f[0] * weight, k_f[1] * weight))
    return inverse(y_f, factors, u.shape[-1], keep)[0].to(u.dtype)


def kept_frequencies(factors: tuple[int, ...], keep: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The frequencies in the corner in permuted order, and of which of them the mirror image N - k is there too."""
    order = permutation(factors, keep)
    return order, torch.isin(-order % prod(factors), order)


class ShortConv1d(nn.Module):
    """A depthwise convolution of few taps over (B, H, L), odd size, same length: what precedes long ones in Hyena."""

    def __init__(self, dim: int, kernel_size: int = 3, bias: bool = True):
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; a short convolution has a middle, so take an odd one")
        self.weight = nn.Parameter(torch.randn(dim, kernel_size) / kernel_size**0.5)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        taps = self.weight.shape[1]
        return F.conv1d(u, self.weight[:, None], self.bias, padding=taps // 2, groups=len(self.weight))


class GlobalFilter1d(nn.Module):
    """(B, H, L) -> the same for L up to `length`: one learned tap per feature and lag; gated on request.

    length: the longest input; lags go from 1 - length to length - 1.
    gated: two linear maps of the input multiply it before and after, as in H3 and Hyena.
    """

    kernel_parameters = ("weight",)
    no_weight_decay = ("weight",)

    def __init__(self, dim: int, length: int, gated: bool = False, backend: Backend = "auto"):
        super().__init__()
        self.length, self.backend = length, backend
        self.weight = nn.Parameter(torch.randn(dim, 2 * length - 1) * length**-0.5)
        self.gates = nn.Conv1d(dim, 2 * dim, 1) if gated else None
        self._kept = Kept()

    def forward(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        self._check(u)
        gates, start = self._gates(u), self.length - 1
        if self.backend not in ("auto", "fft") or kernel_wanted(u) or not may_keep(self, u):
            return fft_conv(u, self.weight, gates, backend=self.backend, start=start)
        n = fast_length(2 * self.length - 1)
        k_f = self._kept(n, [self.weight], lambda: response(self.weight, n))
        return filtered(u, k_f, start, n, gates)

    def reference(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        """The same with the plain composition of FFTs."""
        gate_in, gate_out = self._gates(u)
        return gated(reference_conv(gated(u, gate_in), self.weight, self.length - 1), gate_out)

    def _check(self, u: Tensor) -> None:
        dim = len(self.weight)
        if u.ndim != 3 or u.shape[1] != dim or u.shape[2] > self.length:
            raise BadInput(f"this filter takes (batch, {dim}, up to {self.length} positions), not {tuple(u.shape)}")

    def _gates(self, u: Tensor) -> Gates:
        return (None, None) if self.gates is None else self.gates(u).chunk(2, 1)


class FlashFFTConv(RasterOperator):
    """A kernel for every lag in the map, row by row: (N, C, H, W) -> the same, nothing wraps around.

    Args:
        input_size: (h, w) of the map. gated: multiplicative gates before and after, linear in the input.
        backend: see `fft_conv`.
    """

    def __init__(
        self, dim: int, input_size: tuple[int, int], gated: bool = False, backend: Backend = "auto"
    ):  # fmt: skip
        super().__init__(GlobalFilter1d(dim, input_size[0] * input_size[1], gated, backend), input_size)


VARIANTS = {
    "gated_conv_h100_1k": dict(dim=768, input_size=(1, 1024), gated=True),
    "gated_conv_h100_4k": dict(dim=768, input_size=(1, 4096), gated=True),
    "gated_conv_h100_32k": dict(dim=768, input_size=(1, 32768), gated=True),
    "gated_conv_h100_1m": dict(dim=768, input_size=(1, 2**20), gated=True),
}
