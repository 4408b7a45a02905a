"""Structured global convolution: a sequence-long kernel made of a few short pieces, stretched and damped.

Li et al. 2022, "What Makes Convolutional Models Great on Long Sequence Modeling?", arXiv:2210.09298. Two principles
make long kernels work: few parameters (the number grows with log L) and weights that decay with distance. So S pieces
w_i of d taps each are stretched to twice the length of the one before, damped, and laid end to end (section 3.2):

    k = cat_i( stretch(w_i, 2^max(0, i-1)) m^(S-1-i) ) / Z,        lengths d, d, 2d, 4d, ...; S = 1 + ceil(log2(L / d))

The nearest piece has the largest factor, so with m = 2 each further one is half as strong. Z is the norm that the
kernel has at the start: taken at the first forward pass in the paper, which with the initial weights is the same as at
construction, where it is taken here. It is a buffer, saved with the weights and not updated by training; whoever fills
the pieces anew before training calls `reset_buffers`. Names of parameters follow the official repository,
ctlllll/SGConv (unlicensed; nothing of it is used), whose options `init_scale` and `ln` are left out.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.spectral.sequence import GlobalConvLayer, RasterOperator

Mode = Literal["cat", "sum", "learnable"]
Init = Literal["random", "cos"]
Stretch = Literal["linear", "nearest"]


def cosine_bank(kernels: int, dim: int, taps: int) -> Float[Tensor, "c h t"]:
    """cos of 0, 1, 2, ... turns over the piece, a frequency for each feature in random order."""
    turns = torch.outer(torch.arange(dim), torch.linspace(0, 2 * math.pi, taps))
    return turns.cos()[torch.randperm(dim)].expand(kernels, -1, -1).clone()


def stretched(w: Float[Tensor, "c h d"], scale: int, how: Stretch) -> Float[Tensor, "c h t"]:
    """`scale` times as many taps, interpolated between centres (linear) or repeated (nearest)."""
    return w if scale == 1 else F.interpolate(w, scale_factor=scale, mode=how)


class SGConv(GlobalConvLayer):
    """The layer of the paper on sequences, (B, H, L) -> (B, H, L).

    Args:
        dim, length, channels, bidirectional, dropout, tie_dropout: see GlobalConvLayer.
        kernel_dim: taps d of a piece, 32 or 64 in the paper.
        decay_min, decay_max: the damping m, from the first feature to the last; 1 for none.
        mode: "cat" lays pieces end to end; "sum" adds them up from lag 0, stretched by 2^i; "learnable" is "cat" times
            exp(-decay log(1 + t)) instead of m, with a learned decay per feature that starts between the two.
        init: "random" N(0, 1) or a "cos" bank. stretch: "linear" or "nearest".
    Raises BadInput: an unknown mode, init or stretch, no taps or positions, or an input that is longer than `length`.
    """

    kernel_options = ("mode", "stretch")

    def __init__(
        self, dim: int, length: int, channels: int = 1, bidirectional: bool = False, dropout: float = 0.0,
        tie_dropout: bool = False, kernel_dim: int = 64, decay_min: float = 2.0, decay_max: float = 2.0,
        mode: Mode = "cat", init: Init = "random", stretch: Stretch = "linear",
    ):  # fmt: skip
        super().__init__(dim, length, channels, bidirectional, dropout, tie_dropout)
        _known("mode", mode, ("cat", "sum", "learnable"))
        _known("init", init, ("random", "cos"))
        _known("stretch", stretch, ("linear", "nearest"))
        if kernel_dim < 1 or length < 1:
            raise BadInput(f"kernel_dim={kernel_dim} and length={length}: both are at least 1")
        self.kernel_dim, self.mode, self.stretch = kernel_dim, mode, stretch
        self.decay_range = decay_min, decay_max
        self.scales = 1 + max(0, math.ceil(math.log2(length / kernel_dim)))
        shape = (channels * self.directions, dim, kernel_dim)
        pieces = (torch.randn(shape) if init == "random" else cosine_bank(*shape) for _ in range(self.scales))
        self.kernel_list = nn.ParameterList(pieces)
        if mode == "learnable":
            self.decay = nn.Parameter(decay_min + (decay_max - decay_min) * torch.rand(dim))
        self.register_buffer("multiplier", None)
        self.register_buffer("kernel_norm", None)
        self.reset_buffers()

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """m, and Z for the pieces as they are now: for pieces that were filled anew, also after `to_empty`."""
        piece, low_high = self.kernel_list[0], self.decay_range
        multiplier = piece.new_ones(1) if self.mode == "learnable" else torch.linspace(*low_high, self.dim).to(piece)
        self.multiplier = multiplier.view(1, -1, 1)
        self.kernel_norm = self.raw_kernels().norm(dim=-1, keepdim=True)

    @property
    def kernel_parameters(self) -> tuple[str, ...]:
        """The pieces, and the decay where it is learned."""
        pieces = tuple(f"kernel_list.{i}" for i in range(self.scales))
        return (*pieces, "decay") if self.mode == "learnable" else pieces

    def raw_kernels(self) -> Float[Tensor, "dc h t"]:
        """The assembled kernels before they are divided by Z; at least `length` taps."""
        factors = [self.multiplier ** (self.scales - 1 - i) for i in range(self.scales)]
        if self.mode == "sum":
            parts = [stretched(w, 2**i, self.stretch) * m for i, (w, m) in enumerate(zip(self.kernel_list, factors))]
            longest = parts[-1].shape[-1]
            return torch.stack([F.pad(part, (0, longest - part.shape[-1])) for part in parts]).sum(0)
        parts = [stretched(w, 2 ** max(0, i - 1), self.stretch) * m
                 for i, (w, m) in enumerate(zip(self.kernel_list, factors))]  # fmt: skip
        k = torch.cat(parts, -1)
        if self.mode == "learnable":
            lags = torch.arange(1, k.shape[-1] + 1, device=k.device, dtype=k.dtype)
            k = k * torch.exp(-self.decay[:, None] * lags.log())
        return k

    def kernels(self) -> Float[Tensor, "dc h t"]:
        """The kernels, of norm 1 at the start (before they are cut to the input's length)."""
        return (self.raw_kernels() / self.kernel_norm)[..., : self.length]


def _known(option: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise BadInput(f"{option}={value!r} is not known; it is one of {', '.join(values)}")


class SGConv2d(RasterOperator):
    """The layer on maps of one size: (N, C, H, W) -> the same, pixels row by row, looking both ways unless told not to.

    Args:
        input_size: (h, w) of the map. The rest as in SGConv; `kernel_dim` is 32, a size for maps.
    """

    def __init__(
        self, dim: int, input_size: tuple[int, int], channels: int = 1, bidirectional: bool = True,
        dropout: float = 0.0, kernel_dim: int = 32, decay_min: float = 2.0, decay_max: float = 2.0,
        mode: Mode = "cat", init: Init = "random", stretch: Stretch = "linear",
    ):  # fmt: skip
        length = input_size[0] * input_size[1]
        layer = SGConv(
            dim, length, channels, bidirectional, dropout, kernel_dim=kernel_dim, decay_min=decay_min,
            decay_max=decay_max, mode=mode, init=init, stretch=stretch,
        )  # fmt: skip
        super().__init__(layer, input_size)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official repository also saves whether Z has been taken; its multiplier may be a plain number."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("kernel_norm_initialized")}
    return {n: t.view(1, 1, 1) if n.endswith("multiplier") and t.ndim == 0 else t for n, t in kept.items()}


VARIANTS = {"sgconv_1m": dict(dim=256, input_size=(1024, 1024), kernel_dim=32)}
