"""The Monarch decomposition: a discrete Fourier transform as a few small matrix products.

Fu et al. 2023, FlashFFTConv, arXiv:2311.05908, section 3.1. For N = N1 N2 the signal is an N1 x N2 matrix
x[n1, n2] (n = n1 N2 + n2), and

    X[k1 + N1 k2] = sum_n2 F_N2[k2, n2]  w^(k1 n2)  sum_n1 F_N1[k1, n1] x[n1, n2],        w = exp(-2 pi i / N)

a product from the left, one factor per element (the twiddles), and a product from the right, which may itself be
decomposed: order p has p factors. Spectra come out permuted, frequency k1 + N1 k2 at position k1 N2 + k2; a convolution
multiplies them element by element, so nobody ever sorts them. The inverse mirrors this with conjugates, every matrix
divided by its size, so that 1 / N is applied once. Complex numbers are pairs (real, imaginary), since matrix units know
no others; a pair whose second part is None is real, and its product costs half.

What is known to be zero is not multiplied: a signal that ends early has fewer rows (implicit padding), and outputs that
nobody wants have none (`rows`, `keep`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from math import inf, prod

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from opsin.errors import BadInput

Pair = tuple[Tensor, Tensor | None]  # real and imaginary part; None where there is none
Step = Callable[[int, Pair, int | None], Pair]  # (size, (..., size, m), rows kept) -> DFT of the columns


def roots(rows: int, columns: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """exp(-2 pi i r c / n) of all rows r and columns c; angles are exact, for r c is taken modulo n first."""
    make = _roots.__wrapped__ if torch.compiler.is_compiling() else _roots
    return make(rows, columns, n, device, dtype)


@cache
def _roots(rows: int, columns: int, n: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        power = torch.arange(rows, device=device)[:, None] * torch.arange(columns, device=device) % n
        angle = power.double() * (-2 * torch.pi / n)
        return angle.cos().to(dtype), angle.sin().to(dtype)


def complex_product(a: Pair, b: Pair, product: Callable[[Tensor, Tensor], Tensor] = torch.mul) -> Pair:
    """a b of pairs, for any bilinear `product`."""
    (a_re, a_im), (b_re, b_im) = a, b
    if a_im is None and b_im is None:
        return product(a_re, b_re), None
    if b_im is None:
        return product(a_re, b_re), product(a_im, b_re)
    if a_im is None:
        return product(a_re, b_re), product(a_re, b_im)
    return product(a_re, b_re) - product(a_im, b_im), product(a_re, b_im) + product(a_im, b_re)


def conjugate(a: Pair) -> Pair:
    return a[0], None if a[1] is None else -a[1]


def mapped(a: Pair, function: Callable[[Tensor], Tensor]) -> Pair:
    return function(a[0]), None if a[1] is None else function(a[1])


def dft(size: int, x: Pair, keep: int | None = None) -> Pair:
    """The DFT along the second axis from the end, which may be short of `size` (zeros follow); `keep` rows of it."""
    re, im = roots(size, size, size, x[0].device, x[0].dtype)
    part = (slice(keep), slice(x[0].shape[-2]))
    return complex_product((re[part], im[part]), x, torch.matmul)


def inverse_dft(size: int, x: Pair, keep: int | None = None) -> Pair:
    """The inverse of `dft`, with its 1 / size."""
    re, im = roots(size, size, size, x[0].device, x[0].dtype)
    part = (slice(keep), slice(x[0].shape[-2]))
    return complex_product((re[part] / size, -im[part] / size), x, torch.matmul)


def transform(x: Pair, factors: Sequence[int], keep: Sequence[int] | None = None, step: Step = dft) -> Pair:
    """The DFT of size prod(factors) along the last axis, zero-padded there if it is shorter; permuted order.

    keep: the lowest rows kept of each factor's index, which leaves prod(keep) frequencies.
    step: what transforms the columns of each factor.
    """
    first, *rest = factors
    count, *others = keep or (None,) * len(factors)
    if not rest:
        return mapped(step(first, mapped(x, lambda t: t[..., None]), count), lambda t: t[..., 0])
    inner = prod(rest)
    rows = -(-x[0].shape[-1] // inner)
    x = mapped(x, lambda t: F.pad(t, (0, rows * inner - t.shape[-1])).unflatten(-1, (rows, inner)))
    x = step(first, x, count)
    x = complex_product(x, _twiddles(first, inner, x))
    if len(rest) == 1:
        x = step(rest[0], mapped(x, lambda t: t.mT), others[0])
        return mapped(x, lambda t: t.mT.flatten(-2))
    return mapped(transform(x, rest, others if keep else None, step), lambda t: t.flatten(-2))


def inverse(x: Pair, factors: Sequence[int], length: int | None = None, keep: Sequence[int] | None = None) -> Pair:
    """The inverse of `transform`; `length` positions of it, and `keep` as there."""
    first, *rest = factors
    count, *others = keep or tuple(factors)
    inner = prod(rest)
    if not rest:
        return mapped(inverse_dft(first, mapped(x, lambda t: t[..., None]), length), lambda t: t[..., 0])
    x = mapped(x, lambda t: t.unflatten(-1, (count, -1)))
    if len(rest) > 1:
        x = inverse(x, rest, keep=others)
    else:
        x = mapped(inverse_dft(rest[0], mapped(x, lambda t: t.mT)), lambda t: t.mT)
    x = complex_product(x, conjugate(_twiddles(first, inner, x)))
    length = length or first * inner
    x = inverse_dft(first, x, -(-length // inner))
    return mapped(x, lambda t: t.flatten(-2)[..., :length])


def _twiddles(first: int, inner: int, x: Pair) -> Pair:
    """w^(k1 n2) for the rows that x has."""
    re, im = roots(first, inner, first * inner, x[0].device, x[0].dtype)
    rows = x[0].shape[-2]
    return re[:rows], im[:rows]


@cache
def permutation(factors: tuple[int, ...], keep: tuple[int, ...] | None = None) -> Int[Tensor, " n"]:
    """The frequency at each position of a permuted spectrum."""
    first, *rest = factors
    count, *others = keep or factors
    if not rest:
        return torch.arange(count, device="cpu")
    inner = permutation(tuple(rest), tuple(others))
    return (torch.arange(count, device="cpu")[:, None] + first * inner).flatten()


@cache
def inverse_permutation(factors: tuple[int, ...]) -> Int[Tensor, " n"]:
    """The position of each frequency in a permuted spectrum."""
    return permutation(factors).argsort()


def real_transform(x: Float[Tensor, "*b l"], factors: Sequence[int]) -> Pair:
    """The spectrum of a real signal of N = 2 prod(factors) by a complex transform of half the size (section 3.1).

    Even samples are the real part and odd ones the imaginary part of z. From its spectrum Z, with M = N / 2,

        X[k] = (Z[k] + Z[M-k]*) / 2 - i exp(-2 pi i k / N) (Z[k] - Z[M-k]*) / 2

    Frequencies 0 to M - 1 in permuted order; X[0] and X[M] are real and share the place of X[0].
    """
    x = F.pad(x, (0, x.shape[-1] % 2)).unflatten(-1, (-1, 2))
    z = transform((x[..., 0], x[..., 1]), factors)
    even, odd = _halves(z, factors)
    odd = complex_product(odd, _half_turns(factors, z))
    re, im = even[0] + odd[0], even[1] + odd[1]
    zero, half = z[0][..., :1] + z[1][..., :1], z[0][..., :1] - z[1][..., :1]
    return torch.cat((zero, re[..., 1:]), -1), torch.cat((half, im[..., 1:]), -1)


def real_inverse(x: Pair, factors: Sequence[int], length: int | None = None) -> Float[Tensor, "*b l"]:
    """The real signal of such a spectrum: the formula of `real_transform` solved for Z."""
    zero, half = x[0][..., :1], x[1][..., :1]
    even, odd = _halves(x, factors)
    odd = complex_product(odd, conjugate(_half_turns(factors, x)))
    re = torch.cat(((zero + half) / 2, (even[0] + odd[0])[..., 1:]), -1)
    im = torch.cat(((zero - half) / 2, (even[1] + odd[1])[..., 1:]), -1)
    length = length or 2 * prod(factors)
    z = inverse((re, im), factors, -(-length // 2))
    return torch.stack(z, -1).flatten(-2)[..., :length]


def real_product(a: Pair, b: Pair) -> Pair:
    """The product of two spectra of `real_transform`: complex, but two real ones in the first place."""
    re, im = complex_product(a, b)
    return (
        torch.cat((a[0][..., :1] * b[0][..., :1], re[..., 1:]), -1),
        torch.cat((a[1][..., :1] * b[1][..., :1], im[..., 1:]), -1),
    )


def _halves(z: Pair, factors: Sequence[int]) -> tuple[Pair, Pair]:
    """(Z[k] + Z[M-k]*) / 2 and (Z[k] - Z[M-k]*) / 2, with every k at its place."""
    order, places = permutation(tuple(factors)), inverse_permutation(tuple(factors))
    mirror = places[-order % len(order)].to(z[0].device)
    re, im = z[0][..., mirror], z[1][..., mirror]
    return ((z[0] + re) / 2, (z[1] - im) / 2), ((z[0] - re) / 2, (z[1] + im) / 2)


def _half_turns(factors: Sequence[int], like: Pair) -> Pair:
    """-i exp(-2 pi i k / N) of the permuted frequencies."""
    n = 2 * prod(factors)
    re, im = roots(2, n // 2, n, like[0].device, like[0].dtype)
    order = permutation(tuple(factors)).to(like[0].device)
    return im[1][order], -re[1][order]


def complex_flops(factors: Sequence[int]) -> int:
    """Operations of one transform's products, a complex multiplication and addition being two: 2 N sum(N_i).

    Real matrix units do four times as many.
    """
    return 2 * prod(factors) * sum(factors)


@dataclass(frozen=True)
class Accelerator:
    """The numbers of the cost model (section 3.3); about those of an A100, as recalled: nobody measured them here.

    unit: side of the smallest matrix that the matrix units take. matmul, general: operations per second in and out of
    them. outer, inner: bytes per second to the device's memory and to the memory beside the units. fused: complex
    numbers that fit there.
    """

    unit: int = 16
    matmul: float = 234e12
    general: float = 17.6e12
    outer: float = 1.35e12
    inner: float = 9.5e12
    fused: int = 32768

    def seconds(self, factors: Sequence[int]) -> float:
        """Time of one sequence through the convolution: sum_i 16 N N_i / gamma(N_i) + 4 N / omega(i), equation 2."""
        n, time = prod(factors), 0.0
        for i, size in enumerate(factors):
            fits = prod(factors[i:]) <= self.fused
            time += 16 * n * size / (self.matmul if size >= self.unit else self.general)
            time += 4 * n / (self.inner if fits else self.outer)
        return time


@cache
def best_factors(n: int, accelerator: Accelerator = Accelerator(), most: int = 4) -> tuple[int, ...]:
    """The factors of n, largest first, that the cost model finds fastest.

    Raises BadInput where n has a prime factor over 64, which would be no small matrix.
    """
    choices = [f for order in range(1, most + 1) for f in _factorisations(n, order, 64)]
    if not choices:
        raise BadInput(f"a transform of size {n} does not split into matrices of up to 64; pad it to a power of 2")
    return min(choices, key=lambda f: accelerator.seconds(f) if f else inf)


def _factorisations(n: int, order: int, largest: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of so many factors, none larger than the one before it."""
    if order == 1:
        if n <= largest:
            yield (n,)
        return
    for first in range(min(n, largest), 1, -1):
        if n % first == 0:
            yield from ((first, *rest) for rest in _factorisations(n // first, order - 1, first))
