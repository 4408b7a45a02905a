"""Long convolution: a kernel as long as the sequence, learned tap by tap, and kept smooth by a squash.

Fu et al. 2023, "Simple Hardware-Efficient Long Convolutions for Sequence Modeling", arXiv:2302.06646. State space
models make long kernels out of a few numbers, which regularises them. Learned directly, the kernels are noisy and
overfit; it is enough to shrink every tap towards zero at each forward pass, so that small ones vanish (section 3):

    k' = sign(k) max(|k| - lambda, 0);    y = k' * u + D u;    out = GLU(W dropout(GELU(y)))

With taps drawn from N(0, 0.002^2), lambda = 0.003 sets nine of ten to zero at first, and a tap at zero gets no
gradient: lambda has to be small beside the taps, and D and W carry the start of training. Optionally kernels are
smoothed before the squash, by a moving average in time or by a Gaussian over frequencies. Parameter names follow
HazyResearch/safari, whose Gaussian is not normalised to sum 1 as ours is.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.spectral.butterfly import BlockFFT, block_length
from opsin.ops.spectral.sequence import GlobalConvLayer, RasterOperator

Smoothing = Literal["none", "time", "frequency"]
Init = Literal["random", "double_exp"]


def squash(k: Tensor, lam: float) -> Tensor:
    """The soft threshold sign(k) max(|k| - lam, 0): section 3.2."""
    return k.sign() * F.relu(k.abs() - lam)


def smooth_in_time(k: Float[Tensor, "c h t"], window: int) -> Float[Tensor, "c h t"]:
    """Moving average over `window` taps, zeros outside."""
    return F.avg_pool1d(k, window, stride=1, padding=window // 2)


def smooth_in_frequency(k: Float[Tensor, "c h t"], window: int) -> Float[Tensor, "c h t"]:
    """Average of `window` neighbouring frequencies, weighted by exp(-d^2 / 2), zeros outside the half spectrum."""
    distance = torch.arange(window, device=k.device, dtype=k.dtype) - window // 2
    weight = torch.softmax(-0.5 * distance.square(), 0).view(1, 1, -1)
    k_f = torch.view_as_real(torch.fft.rfft(k)).movedim(-1, 0)
    smooth = F.conv1d(k_f.reshape(-1, 1, k_f.shape[-1]), weight, padding=window // 2).view_as(k_f)
    return torch.fft.irfft(torch.complex(*smooth.unbind()), k.shape[-1])


def decaying(channels: int, dim: int, length: int) -> Float[Tensor, "c h t"]:
    """0.02 N(0, 1) times exp(-(t / L) (H / 2)^(h / H)): every feature forgets at a rate of its own."""
    rates = (dim // 2) ** (torch.arange(dim) / dim)
    return 0.02 * torch.randn(channels, dim, length) * torch.exp(-rates[:, None] * torch.arange(length) / length)


class LongConv(GlobalConvLayer):
    """The layer of the paper on sequences, (B, H, L) -> (B, H, L).

    Args:
        dim, length, channels, bidirectional, dropout, tie_dropout: see GlobalConvLayer.
        lam: the squash's threshold, in units of taps. kernel_dropout: rate of taps set to zero in training.
        init: "random", or "double_exp" with taps that decay. smoothing, window: none, or over so many taps or bins.
    Raises BadInput: an unknown init or smoothing, an even window, or an input that is longer than `length`.
    """

    kernel_parameters = ("kernel",)
    kernel_options = ("lam", "smoothing", "window")

    def __init__(
        self, dim: int, length: int, channels: int = 1, bidirectional: bool = False, dropout: float = 0.0,
        tie_dropout: bool = False, lam: float = 0.001, kernel_dropout: float = 0.0, init: Init = "random",
        smoothing: Smoothing = "none", window: int = 7,
    ):  # fmt: skip
        super().__init__(dim, length, channels, bidirectional, dropout, tie_dropout)
        if init not in ("random", "double_exp") or smoothing not in ("none", "time", "frequency"):
            raise BadInput(
                f'init is "random" or "double_exp" and smoothing "none", "time" or "frequency", not {init!r} and '
                f"{smoothing!r}"
            )
        if window % 2 == 0:
            raise BadInput(f"window={window} is even; a window of smoothing has a middle, so take an odd one")
        self.lam, self.smoothing, self.window = lam, smoothing, window
        kernels = channels * self.directions
        random = 0.002 * torch.randn(kernels, dim, length)
        self.kernel = nn.Parameter(random if init == "random" else decaying(kernels, dim, length))
        self.kernel_drop = nn.Dropout(kernel_dropout)

    def kernels(self) -> Float[Tensor, "dc h t"]:
        """The learned taps, smoothed, squashed, and in training some of them dropped."""
        k = self.kernel
        if self.smoothing == "time":
            k = smooth_in_time(k, self.window)
        elif self.smoothing == "frequency":
            k = smooth_in_frequency(k.float(), self.window).to(k.dtype)
        return self.kernel_drop(squash(k, self.lam))


class ButterflyLongConv(LongConv):
    """The learned butterfly extension (section 4.3): the FFTs of signal and kernel are block FFTs that are trained.

    At the start a long convolution; then the small DFT matrices move, and it becomes a more general linear map at the
    same cost. The way back is the exact inverse FFT. One set of matrices serves all features.

    Args:
        learned: "replaced" trains the matrices themselves, "additive" a small matrix added to each exact one.
        factor: the largest DFT matrix, a power of 2.
        The rest as in LongConv.
    """

    def __init__(
        self, dim: int, length: int, channels: int = 1, bidirectional: bool = False, dropout: float = 0.0,
        tie_dropout: bool = False, lam: float = 0.001, kernel_dropout: float = 0.0, init: Init = "random",
        smoothing: Smoothing = "none", window: int = 7, factor: int = 16,
        learned: Literal["replaced", "additive"] = "replaced",
    ):  # fmt: skip
        super().__init__(
            dim, length, channels, bidirectional, dropout, tie_dropout, lam, kernel_dropout, init, smoothing, window
        )
        self.block_fft_u, self.block_fft_k = (BlockFFT(factor, learned) for _ in range(2))

    def convolve(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b c h l"]:
        length = u.shape[-1]
        start = length - 1 if self.bidirectional else 0
        n = block_length(2 * length)
        wide = torch.promote_types(u.dtype, torch.float32)
        u_f = self.block_fft_u(u.to(wide), n)[:, None]
        y_f = u_f * self.block_fft_k(self.taps(length).to(wide), n)
        return torch.fft.ifft(y_f).real[..., start : start + length].to(u.dtype)

    def reference(self, u: Float[Tensor, "b h l"]) -> Float[Tensor, "b h l"]:
        """What the layer starts as, and no longer is once its matrices have moved: the long convolution."""
        return super().reference(u)


class LongConv2d(RasterOperator):
    """The layer on maps of one size: (N, C, H, W) -> the same, pixels row by row, looking both ways unless told not to.

    Args:
        input_size: (h, w) of the map. The rest as in LongConv.
    """

    def __init__(
        self, dim: int, input_size: tuple[int, int], channels: int = 1, bidirectional: bool = True,
        dropout: float = 0.0, lam: float = 0.001, kernel_dropout: float = 0.0, init: Init = "random",
        smoothing: Smoothing = "none", window: int = 7,
    ):  # fmt: skip
        length = input_size[0] * input_size[1]
        layer = LongConv(
            dim, length, channels, bidirectional, dropout, lam=lam, kernel_dropout=kernel_dropout, init=init,
            smoothing=smoothing, window=window,
        )  # fmt: skip
        super().__init__(layer, input_size)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of HazyResearch/safari's layer to ours. Kernels of its standalone layer go through `split_wrapped`, too."""
    return {name.replace("kernel.kernel", "kernel"): tensor for name, tensor in state.items()}


def split_wrapped(kernel: Float[Tensor, "c h two_t"]) -> Float[Tensor, "two_c h t"]:
    """A kernel of safari's standalone layer as the two directions of a bidirectional LongConv.

    That layer has 2L taps at FFT size 2L, meant to be causal; but the second half wraps around, and tap 2L - m has the
    lag -m. That is a kernel of the other direction, farthest tap first.
    """
    back, ahead = kernel.chunk(2, -1)
    return torch.cat((back, ahead.flip(-1)))
