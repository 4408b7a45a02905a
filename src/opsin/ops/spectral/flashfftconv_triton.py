"""The Monarch FFT convolution as one Triton kernel: transform, product with the kernel's spectrum, inverse, gates.

arXiv:2311.05908, section 3.1, for orders 2 and 3. A program handles one feature of two samples: since kernels are real,
two real signals ride one complex transform, one as its real and the other as its imaginary part, and come out as they
went in. Rows beyond the input are neither loaded nor multiplied, and rows that nobody wants are not computed.

The gradient of the input is the same kernel with the conjugate spectrum. That of the taps is a sum over samples of
conj(U) G in the permuted order, transformed back once; a program sums over a part of the batch.
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.kernels import launching_on
from opsin.ops.spectral.fourier import Gates, gated_type
from opsin.ops.spectral.monarch import best_factors, inverse, roots, transform

# Bytes of memory beside the matrix units that the larger kernel, that of the taps, was compiled to by Triton 3.9.
SHARED = {256: 14336, 512: 30720, 1024: 57344, 2048: 143360, 4096: 167936}
SAMPLES = 8  # pairs of samples that a program of the taps' gradient adds up


def fused_factors(n: int, cuda: torch.device | None) -> tuple[int, ...] | None:
    """Factors of a transform of size n for the fused kernel, or None where it has none or the device no room."""
    if n not in SHARED:
        return None
    if cuda and torch.cuda.get_device_properties(cuda).shared_memory_per_block_optin < SHARED[n]:
        return None
    return best_factors(n, most=3)


@triton.jit
def _product(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _left(f_re, f_im, x_re, x_im, PRECISION: tl.constexpr):
    """F x by real matrix products."""
    re = tl.dot(f_re, x_re, input_precision=PRECISION) - tl.dot(f_im, x_im, input_precision=PRECISION)
    im = tl.dot(f_re, x_im, input_precision=PRECISION) + tl.dot(f_im, x_re, input_precision=PRECISION)
    return re, im


@triton.jit
def _square(matrix, SIZE: tl.constexpr):
    """A symmetric SIZE x SIZE DFT matrix: a table of real parts and, behind them, imaginary ones."""
    place = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    return tl.load(matrix + place), tl.load(matrix + SIZE * SIZE + place)


@triton.jit
def _rectangle(table, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr):
    """The first ROWS x COLUMNS of such a table with rows of STRIDE and SIZE numbers in a part."""
    place = tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]
    return tl.load(table + place), tl.load(table + SIZE + place)


@triton.jit
def _inner(re, im, f2, w2, f3, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr):
    """The DFT of every row of (N1, N2 N3), in permuted order; N3 = 1 is order 2."""
    if N3 == 1:
        f_re, f_im = _square(f2, N2)
        re, im = _left(re, im, f_re, f_im, PRECISION)
    else:
        f_re, f_im = _square(f2, N2)
        f_re = tl.broadcast_to(f_re[None, :, :], (N1, N2, N2))
        f_im = tl.broadcast_to(f_im[None, :, :], (N1, N2, N2))
        re, im = _left(f_re, f_im, tl.reshape(re, (N1, N2, N3)), tl.reshape(im, (N1, N2, N3)), PRECISION)
        w_re, w_im = _rectangle(w2, N2, N3, N3, N2 * N3)
        re, im = _product(re, im, w_re[None, :, :], w_im[None, :, :])
        g_re, g_im = _square(f3, N3)
        re, im = _left(tl.reshape(re, (N1 * N2, N3)), tl.reshape(im, (N1 * N2, N3)), g_re, g_im, PRECISION)
        re, im = tl.reshape(re, (N1, N2 * N3)), tl.reshape(im, (N1, N2 * N3))
    return re, im


@triton.jit
def _inner_inverse(re, im, f2, w2, f3, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, PRECISION: tl.constexpr):
    """The conjugate of `_inner`, without 1 / (N2 N3)."""
    if N3 == 1:
        f_re, f_im = _square(f2, N2)
        re, im = _left(re, im, f_re, -f_im, PRECISION)
    else:
        g_re, g_im = _square(f3, N3)
        re, im = _left(tl.reshape(re, (N1 * N2, N3)), tl.reshape(im, (N1 * N2, N3)), g_re, -g_im, PRECISION)
        re, im = tl.reshape(re, (N1, N2, N3)), tl.reshape(im, (N1, N2, N3))
        w_re, w_im = _rectangle(w2, N2, N3, N3, N2 * N3)
        re, im = _product(re, im, w_re[None, :, :], -w_im[None, :, :])
        f_re, f_im = _square(f2, N2)
        f_re = tl.broadcast_to(f_re[None, :, :], (N1, N2, N2))
        f_im = tl.broadcast_to(f_im[None, :, :], (N1, N2, N2))
        re, im = _left(f_re, -f_im, re, im, PRECISION)
        re, im = tl.reshape(re, (N1, N2 * N3)), tl.reshape(im, (N1, N2 * N3))
    return re, im


@triton.jit
def _forward(re, im, f1, w1, f2, w2, f3, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ROWS: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """The permuted spectrum (N1, N2 N3) of a signal of which ROWS rows are not known to be zero."""
    f_re, f_im = _rectangle(f1, N1, ROWS, N1, N1 * N1)
    re, im = _left(f_re, f_im, re, im, PRECISION)
    w_re, w_im = _rectangle(w1, N1, N2 * N3, N2 * N3, N1 * N2 * N3)
    re, im = _product(re, im, w_re, w_im)
    return _inner(re, im, f2, w2, f3, N1, N2, N3, PRECISION)


@triton.jit
def _backward(re, im, f1, w1, f2, w2, f3, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ROWS: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """The first ROWS rows of the signal with this spectrum; 1 / N is applied here, once."""
    re, im = _inner_inverse(re, im, f2, w2, f3, N1, N2, N3, PRECISION)
    w_re, w_im = _rectangle(w1, N1, N2 * N3, N2 * N3, N1 * N2 * N3)
    scale = 1.0 / (N1 * N2 * N3)
    re, im = _product(re, im, w_re * scale, -w_im * scale)
    f_re, f_im = _rectangle(f1, ROWS, N1, N1, N1 * N1)
    return _left(f_re, -f_im, re, im, PRECISION)


@triton.jit
def _signal(x, gate, feature, sample, samples, features, length, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            GATED: tl.constexpr):  # fmt: skip
    """Rows of one sample of (samples, features, length), zero beyond its end and for samples that there are not."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    base = (sample.to(tl.int64) * features + feature) * length
    mask = place < tl.where(sample < samples, length, 0)
    value = tl.load(x + base + place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        value = value * tl.load(gate + base + place, mask=mask, other=0.0).to(tl.float32)
    return value, base + place, mask


@triton.jit
def convolution_kernel(
    x, gate_in, gate_out, k_f, y, f1, w1, f2, w2, f3, samples, features, length, start,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ROWS: tl.constexpr, OUT_ROWS: tl.constexpr,
    GATED_IN: tl.constexpr, GATED_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y[i] = gate_out[i] (k conv (gate_in x))[i + start] for two samples of one feature."""
    feature, pair = tl.program_id(0), tl.program_id(1)
    columns: tl.constexpr = N2 * N3
    re, _, _ = _signal(x, gate_in, feature, 2 * pair, samples, features, length, ROWS, columns, GATED_IN)
    im, _, _ = _signal(x, gate_in, feature, 2 * pair + 1, samples, features, length, ROWS, columns, GATED_IN)
    re, im = _forward(re, im, f1, w1, f2, w2, f3, N1, N2, N3, ROWS, PRECISION)
    k_re, k_im = _rectangle(k_f + feature.to(tl.int64) * 2 * N1 * columns, N1, columns, columns, N1 * columns)
    re, im = _product(re, im, k_re, k_im)
    re, im = _backward(re, im, f1, w1, f2, w2, f3, N1, N2, N3, OUT_ROWS, PRECISION)
    place = tl.arange(0, OUT_ROWS)[:, None] * columns + tl.arange(0, columns)[None, :] - start
    for half in tl.static_range(2):
        sample = 2 * pair + half
        at = (sample.to(tl.int64) * features + feature) * length + place
        mask = (place >= 0) & (place < tl.where(sample < samples, length, 0))
        value = re if half == 0 else im
        if GATED_OUT:
            value = value * tl.load(gate_out + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + at, value, mask=mask)


@triton.jit
def taps_kernel(
    x, grad, out, f1, w1, f2, w2, f3, samples, features, length, padded,
    N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, ROWS: tl.constexpr, GRAD_ROWS: tl.constexpr,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum over 2 PAIRS samples of conj(X) G of one feature, in permuted order, to out (parts, features, 2, N)."""
    feature, part = tl.program_id(0), tl.program_id(1)
    columns: tl.constexpr = N2 * N3
    sum_re = tl.zeros((N1, columns), dtype=tl.float32)
    sum_im = tl.zeros((N1, columns), dtype=tl.float32)
    for i in range(PAIRS):
        sample = 2 * (part * PAIRS + i)
        re, _, _ = _signal(x, x, feature, sample, samples, features, length, ROWS, columns, False)
        im, _, _ = _signal(x, x, feature, sample + 1, samples, features, length, ROWS, columns, False)
        g_re, _, _ = _signal(grad, grad, feature, sample, samples, features, padded, GRAD_ROWS, columns, False)
        g_im, _, _ = _signal(grad, grad, feature, sample + 1, samples, features, padded, GRAD_ROWS, columns, False)
        re, im = _forward(re, im, f1, w1, f2, w2, f3, N1, N2, N3, ROWS, PRECISION)
        g_re, g_im = _forward(g_re, g_im, f1, w1, f2, w2, f3, N1, N2, N3, GRAD_ROWS, PRECISION)
        re, im = _product(re, -im, g_re, g_im)
        sum_re += re
        sum_im += im
    place = tl.arange(0, N1)[:, None] * columns + tl.arange(0, columns)[None, :]
    base = out + (part.to(tl.int64) * features + feature) * 2 * N1 * columns
    tl.store(base + place, sum_re)
    tl.store(base + N1 * columns + place, sum_im)


class FusedMonarch:
    """The engine of the fused kernel, for one kernel per feature: two or three factors of 16 and more.

    Products of float32 signals are exact; where signals and gates are bfloat16 or float16 they run as TF32, which keeps
    more digits than these have.
    """

    def __init__(self, factors: tuple[int, ...]):
        if len(factors) not in (2, 3) or min(factors) < 16 or any(f & (f - 1) for f in factors):
            raise BadInput(f"the fused kernel takes two or three factors, powers of 2 from 16 on, not {factors}")
        self.factors = factors

    def convolve(self, u: Tensor, k: Tensor, start: int, n: int, gates: Gates = (None, None)) -> Tensor:
        y = torch.empty_like(u, dtype=gated_type(u, gates), memory_format=torch.contiguous_format)
        self._launch(u.contiguous(), self._spectrum(k), y, start, start + u.shape[-1], gates)
        return y

    def adjoint(self, u: Tensor, k: Tensor, grad: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
        length = u.shape[-1]
        grad = F.pad(grad, (start, 0)).contiguous()
        grad_u = torch.empty_like(grad)
        k_f = self._spectrum(k)
        k_f[:, 1].neg_()
        self._launch(grad, k_f, grad_u, 0, length, (None, None))
        return grad_u[..., :length], self._taps(u.contiguous(), grad)[..., : k.shape[-1]]

    def _launch(self, x: Tensor, k_f: Tensor, y: Tensor, start: int, stop: int, gates: Gates) -> None:
        samples, features, length = x.shape
        gate_in, gate_out = (x if gate is None else gate.contiguous() for gate in gates)
        with launching_on(x):
            convolution_kernel[features, triton.cdiv(samples, 2)](
                x, gate_in, gate_out, k_f, y, *self._tables(x.device), samples, features, length, start, *self._sizes(),
                self._rows(length), self._rows(stop), gates[0] is not None, gates[1] is not None, _precision(y),
                num_warps=self._warps(),
            )  # fmt: skip

    def _taps(self, u: Tensor, grad: Tensor) -> Tensor:
        samples, features, length = u.shape
        pairs = min(SAMPLES, triton.cdiv(samples, 2))
        parts = triton.cdiv(samples, 2 * pairs)
        n = prod(self.factors)
        sums = torch.empty(parts, features, 2, n, device=u.device)
        with launching_on(u):
            taps_kernel[features, parts](
                u, grad, sums, *self._tables(u.device), samples, features, length, grad.shape[-1], *self._sizes(),
                self._rows(length), self._rows(grad.shape[-1]), pairs, _precision(grad), num_warps=self._warps(),
            )  # fmt: skip
        re, im = sums.sum(0).unbind(1)
        return inverse((re, im), self.factors)[0]

    def _spectrum(self, k: Tensor) -> Tensor:
        """(features, 2, n): the permuted spectrum of the taps."""
        return torch.stack(transform((k.float(), None), self.factors), 1)

    def _sizes(self) -> tuple[int, int, int]:
        first, second, *third = self.factors
        return first, second, third[0] if third else 1

    def _warps(self) -> int:
        return 4 if prod(self.factors) <= 1024 else 8

    def _rows(self, length: int) -> int:
        """Rows of the outermost matrix that hold so many positions: a power of 2 that tl.dot takes."""
        first, *rest = self.factors
        return min(first, max(16, triton.next_power_of_2(triton.cdiv(length, prod(rest)))))

    def _tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """Matrices and twiddles, real parts before imaginary ones."""
        n1, n2, n3 = self._sizes()
        shapes = ((n1, n1, n1), (n1, n2 * n3, n1 * n2 * n3), (n2, n2, n2), (n2, n3, n2 * n3), (n3, n3, n3))
        return tuple(torch.stack(roots(*shape, device, torch.float32)) for shape in shapes)


def _precision(x: Tensor) -> str:
    return "tf32" if x.dtype in (torch.float16, torch.bfloat16) else "ieee"
