"""Uniform quantisation by asymmetric min-max, and layers that store and compute with it.

The arithmetic is that of `opsin.layers.fake_quant`. Weights have one range per output channel, activations one per
tensor.
"""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.layers.fake_quant import codes_of, fake_quantise

CONVOLUTIONS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d,
}  # fmt: skip
QUANTISABLE: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)


def is_plain(layer: nn.Module) -> bool:
    """Whether a module computes as PyTorch's own convolution (zero padding) or linear layer does."""
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in QUANTISABLE)


def weight_of(layer: nn.Module) -> Tensor:
    """The weights of a convolution or linear layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def channel_range(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight of every output channel, shaped to broadcast."""
    axes = tuple(range(1, weight.ndim))
    return weight.amin(axes, keepdim=True), weight.amax(axes, keepdim=True)


def pack_codes(codes: Int[Tensor, " n"], bits: int) -> Int[Tensor, " m"]:
    """Codes 0..2^bits - 1 as bytes, the first in the lowest bits; bits divides 8."""
    per_byte = 8 // bits
    padded = F.pad(codes, (0, -len(codes) % per_byte)).view(-1, per_byte).to(torch.int32)
    shifts = bits * torch.arange(per_byte, dtype=torch.int32, device=codes.device)
    return (padded << shifts).sum(1).to(torch.uint8)


def unpack_codes(packed: Int[Tensor, " m"], bits: int) -> Int[Tensor, " n"]:
    """The inverse; the last byte may hold a few codes too many."""
    shifts = bits * torch.arange(8 // bits, dtype=torch.int32, device=packed.device)
    return ((packed.to(torch.int32)[:, None] >> shifts) & (2**bits - 1)).flatten()


class PackedLayer(nn.Module):
    """A convolution or linear layer that stores its weights in a form of its own and unpacks them when used."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.shape, self.kind = tuple(weight_of(layer).shape), type(layer).__name__
        bias = layer.bias
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None
        self.compute: Callable[..., Tensor] = F.linear
        if not isinstance(layer, nn.Linear):
            function = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
            geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            self.compute = partial(function, **geometry)

    def weight(self) -> Tensor:
        """The weights that are stored."""
        raise TypeError(f"{type(self).__name__} does not implement weight()")

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight(), self.bias)


class QuantisedLayer(PackedLayer):
    """A convolution or linear layer whose weights are stored in 2, 4 or 8 bits; nothing of it is trained."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, layer: nn.Module, bits: int):
        super().__init__(layer)
        weight = weight_of(layer).detach()
        codes, scale, zero = codes_of(weight, *channel_range(weight), bits)
        self.bits = bits
        self.register_buffer("codes", pack_codes((codes + 2 ** (bits - 1)).flatten().to(torch.int32), bits))
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.requires_grad_(False)

    def weight(self) -> Tensor:
        """The weights that the codes stand for."""
        codes = unpack_codes(self.codes, self.bits)[: prod(self.shape)].view(self.shape) - 2 ** (self.bits - 1)
        return (codes + self.zero) / self.scale

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.shape}, bits={self.bits}"


class QuantisedActivation(nn.Module):
    """An activation function whose output is rounded to `bits` bits within a range that was calibrated and frozen."""

    low: Tensor
    high: Tensor

    def __init__(self, act: nn.Module, bits: int):
        super().__init__()
        self.act, self.bits, self.calibrating = act, bits, True
        self.register_buffer("low", torch.tensor(float("inf")))
        self.register_buffer("high", torch.tensor(float("-inf")))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        if self.calibrating:
            self.low, self.high = torch.minimum(self.low, x.amin()), torch.maximum(self.high, x.amax())
            return x
        return fake_quantise(x, self.low, self.high, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
