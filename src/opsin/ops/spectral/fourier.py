"""Long convolutions along the last axis through FFTs: what the operators with kernels as long as their input share.

A kernel of K taps whose first one has the lag -`start` acts on L positions as

    y[i] = sum_t k[t] u[i + start - t],    0 <= i < L

which is the part [start, start + L) of a circular convolution of any size n that keeps wrapped terms out of it. Causal
kernels have start = 0; one that looks both ways has 2L - 1 taps and start = L - 1. The smallest n is seldom a good one
(a prime takes eight times as long), so the next product of 2, 3, 5 and 7 is taken. Spectra are complex and larger than
the input; on accelerators backward computes them again instead of keeping them, as FlashFFTConv (arXiv:2311.05908,
section 3.1) does. On a CPU, where that would cost two of eight transforms, it keeps them.
"""

from functools import cache, reduce
from itertools import count, repeat
from math import prod
from typing import Any, Protocol

import torch
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.fft import irfft, rfft
from torch.nn import functional as F

Gates = tuple[Tensor | None, Tensor | None]
BLOCK = 2**22  # bytes of padded float32 signals that one thread of a CPU transforms at once


@cache
def fast_length(least: int) -> int:
    """The smallest even product of 2, 3, 5 and 7 that is at least `least`: a size that FFTs are quick at."""
    size = max(2, least + least % 2)
    while not _smooth(size):
        size += 2
    return size


def _smooth(number: int) -> bool:
    for prime in (2, 3, 5, 7):
        while number % prime == 0:
            number //= prime
    return number == 1


def needed_length(length: int, taps: int, start: int) -> int:
    """The least size of a circular convolution whose part [start, start + length) has no wrapped terms."""
    return max(length + taps - 1 - start, start + length)


def computing(dtype: torch.dtype) -> torch.dtype:
    """The dtype that spectra are computed in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def spectrum(u: Float[Tensor, "*b t"], n: int) -> Complex[Tensor, "*b f"]:
    """The n / 2 + 1 frequencies of a real signal padded to n."""
    return rfft(u if u.dtype.itemsize >= 4 else u.to(computing(u.dtype)), n)


def response(k: Float[Tensor, "*b t"], n: int) -> Complex[Tensor, "*b f"]:
    """The spectrum of a kernel over n. The way back scales nothing then (norm="forward"), and has the most to scale."""
    return rfft(k if k.dtype.itemsize >= 4 else k.to(computing(k.dtype)), n, norm="forward")


def filtered(
    u: Float[Tensor, "*b h l"], k: Tensor, start: int, n: int, gates: Gates = (None, None)
) -> Float[Tensor, "*d h l"]:  # fmt: skip
    """The part [start, start + l) of the circular convolution, gated; k: taps (*c, h, t) or their response (*c, h, f).

    Of the widest type of u and its gates, as with every engine.
    On a CPU a block of features at a time: what is large comes as fresh pages, which cost as much as the transforms.
    """
    (gate_in, gate_out), length, eager = gates, u.shape[-1], not is_compiling()
    # short signals are ruled out before anything is counted, and symbolic sizes before they are compared
    if eager and (k.ndim > 2 or 4 * n * u.numel() > BLOCK * length) and u.is_cpu:
        convolutions = u.numel() // length * (1 if k.ndim == 2 else prod(k.shape[:-2]))
        most = BLOCK * torch.get_num_threads() // (4 * n)
        if convolutions > most and (features := most * u.shape[-2] // convolutions or 1) < u.shape[-2]:
            shape = torch.broadcast_shapes(u.shape[:-1], k.shape[:-1])
            y = u.new_empty(*shape, length, dtype=gated_type(u, gates))
            blocks = [repeat(None) if x is None else x.split(features, -2) for x in (u, k, gate_in, gate_out)]
            for at, v, c, *g in zip(count(step=features), *blocks, strict=False):
                y[..., at : at + features, :] = filtered(v, c, start, n, g)
            return y
    if gate_in is not None:
        u = u * gate_in
    y_f, k_f = spectrum(u, n), k if k.is_complex() else response(k, n)
    # in place, so that what comes next finds memory still in the caches
    y_f = y_f.mul_(k_f) if eager and k_f.ndim == 2 else y_f * k_f
    y = irfft(y_f, n, norm="forward")[..., start : start + length]
    if y.dtype != u.dtype:
        y = y.to(u.dtype)
    if gate_out is None:
        return y
    return y.mul_(gate_out) if eager and gate_out.dtype == y.dtype else y * gate_out


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """x times its gate, if there is one."""
    return x if gate is None else x * gate


def gated_type(x: Tensor, gates: Gates) -> torch.dtype:
    """The dtype of x times its gates: the widest of them."""
    return reduce(torch.promote_types, (gate.dtype for gate in gates if gate is not None), x.dtype)


def reference_conv(
    u: Float[Tensor, "*b h l"], k: Float[Tensor, "*c h t"], start: int = 0
) -> Float[Tensor, "*d h l"]:  # fmt: skip
    """The usual composition, to compare with: both padded to 2l, multiplied, transformed back, cut; t < 2l."""
    n = 2 * u.shape[-1]
    y_f = rfft(u.float(), n) * rfft(k.float(), n)
    return irfft(y_f, n)[..., start : start + u.shape[-1]].to(u.dtype)


class Engine(Protocol):
    """A way to compute circular convolutions of size n, and their gradients, from the signals themselves."""

    def convolve(self, u: Tensor, k: Tensor, start: int, n: int, gates: Gates) -> Tensor:
        """(*b, h, l) with (*c, h, t), whose leading axes broadcast, gated before and after by tensors like u."""
        ...

    def adjoint(self, u: Tensor, k: Tensor, grad: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
        """The gradients of the ungated convolution with respect to u and k."""
        ...


class Fourier:
    """The engine of torch.fft."""

    def convolve(self, u: Tensor, k: Tensor, start: int, n: int, gates: Gates = (None, None)) -> Tensor:
        return filtered(u, k, start, n, gates)

    def adjoint(self, u: Tensor, k: Tensor, grad: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
        into_u, into_k = gradients(spectrum(u, n), response(k, n), grad, start, n)
        return into_u[..., : u.shape[-1]], into_k[..., : k.shape[-1]]


FOURIER = Fourier()


def gradients(u_f: Tensor, k_f: Tensor, grad: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Those of the n inputs and n taps with these, from the gradient of the part that begins at `start`."""
    grad_f = spectrum(F.pad(grad, (start, n - start - grad.shape[-1])), n)
    into_u = (grad_f * k_f.conj_physical()).sum_to_size(u_f.shape)
    into_k = grad_f.conj_physical_().mul_(u_f).sum_to_size(k_f.shape).conj_physical_()
    return irfft(into_u, n, norm="forward"), irfft(into_k, n)


class LongConvolution(torch.autograd.Function):
    """Keeps the signals only: (u, k, gates, start, n, engine) -> gate_out * conv(gate_in * u, k)."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, k: Tensor, gate_in: Tensor | None, gate_out: Tensor | None, start: int, n: int,
        engine: Engine,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(u, k, gate_in, gate_out)
        ctx.place, ctx.engine = (start, n), engine
        return engine.convolve(u, k, start, n, (gate_in, gate_out))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        u, k, gate_in, gate_out = ctx.saved_tensors
        v, grad_out = gated(u, gate_in), None
        if gate_out is not None:
            y = ctx.engine.convolve(v, k, *ctx.place, (None, None))
            grad_out = (grad * y).sum_to_size(gate_out.shape).to(gate_out.dtype)
            grad = gated(grad, gate_out)
        grad_v, grad_k = ctx.engine.adjoint(v, k, grad, *ctx.place)
        grad_in = None if gate_in is None else (grad_v * u).to(gate_in.dtype)
        grad_u = gated(grad_v, gate_in).to(u.dtype)
        return grad_u, grad_k.to(k.dtype), grad_in, grad_out, None, None, None


class FourierConvolution(torch.autograd.Function):
    """The ungated convolution by torch.fft with its spectra kept: (u, k, start, n)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, start: int, n: int) -> Tensor:
        u_f, k_f = spectrum(u, n), response(k, n)
        ctx.save_for_backward(u_f, k_f)
        ctx.place, ctx.shapes = (start, n), ((u.shape[-1], u.dtype), (k.shape[-1], k.dtype))
        return irfft(u_f * k_f, n, norm="forward")[..., start : start + u.shape[-1]].to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        into = gradients(*ctx.saved_tensors, grad, *ctx.place)
        grad_u, grad_k = (g[..., :length].to(dtype) for g, (length, dtype) in zip(into, ctx.shapes, strict=True))
        return grad_u, grad_k, None, None


def long_conv(
    u: Float[Tensor, "*b h l"], k: Float[Tensor, "*c h t"], start: int = 0, n: int | None = None,
    gates: Gates = (None, None), engine: Engine | None = None,
) -> Float[Tensor, "*d h l"]:  # fmt: skip
    """One sequence per feature; see the equation above. Leading axes broadcast: u[:, None] meets c kernels at once.

    n: size of the circular convolution; as large as a linear one needs, unless given.
    gates: each like u or None, multiplied before and after.
    """
    n = n or fast_length(needed_length(u.shape[-1], k.shape[-1], start))
    engine = engine or FOURIER
    if not torch.is_grad_enabled() or is_compiling() or u.is_meta:
        return filtered(u, k, start, n, gates) if engine is FOURIER else engine.convolve(u, k, start, n, gates)
    if isinstance(engine, Fourier) and u.device.type == "cpu":
        return gated(FourierConvolution.apply(gated(u, gates[0]), k, start, n), gates[1])
    return LongConvolution.apply(u, k, *gates, start, n, engine)
