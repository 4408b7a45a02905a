"""Fake quantisation: values rounded to a few levels in float arithmetic, with gradients passed straight through.

    scale = (2^b - 1) / (max - min);  zero = round(scale min) + 2^(b-1)
    q = clamp(round(scale x - zero), -2^(b-1), 2^(b-1) - 1);  x' = (q + zero) / scale,  dx'/dx = 1

The zero point is whole, so that 0 stays 0 wherever the range holds it. `fake_quantised` puts it on the weights and the
inputs of a network's layers, for fine-tuning in low precision.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

MIN_RANGE = 1e-8


def codes_of(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Integer codes of x, the scale and the zero point for the range low..high (which broadcasts against x)."""
    half = 2 ** (bits - 1)
    scale = (2**bits - 1) / (high - low).clamp(min=MIN_RANGE)
    zero = torch.round(scale * low) + half
    return torch.clamp(torch.round(scale * x - zero), -half, half - 1), scale, zero


def fake_quantise(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x rounded to the nearest of 2^bits evenly spaced values from low to high."""
    codes, scale, zero = codes_of(x, low, high, bits)
    return (codes + zero) / scale


class StraightThrough(torch.autograd.Function):
    """f(x) in the forward pass, x in the backward pass; exactly f(x), where `x + (f(x) - x).detach()` rounds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def straight_through(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), whose derivative counts as one."""
    with torch.no_grad():
        value = function(x)
    return StraightThrough.apply(x, value) if torch.is_grad_enabled() else value


def percentile_range(weight: Float[Tensor, "m *rest"], percent: float) -> tuple[Tensor, Tensor]:
    """What `percent` of each output channel's weights lie below, and above; shaped to broadcast."""
    ends = torch.tensor([percent / 100, 1 - percent / 100], device=weight.device, dtype=torch.float32)
    low, high = torch.quantile(weight.detach().float().flatten(1), ends, dim=1).to(weight.dtype)
    shape = (-1, *[1] * (weight.ndim - 1))
    return low.view(shape), high.view(shape)


class WeightQuantiser(nn.Module):
    """Weights (m, ...) in `bits` bits, with a range per output channel that leaves out `percent` on either side."""

    def __init__(self, bits: int, percent: float = 0.1):
        super().__init__()
        self.bits, self.percent = bits, percent

    def forward(self, weight: Float[Tensor, "m *rest"]) -> Float[Tensor, "m *rest"]:
        low, high = percentile_range(weight, self.percent)
        return straight_through(weight, lambda w: fake_quantise(w, low, high, self.bits))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, percent={self.percent}"


class ActivationQuantiser(nn.Module):
    """Activations in `bits` bits; the range is a moving average of the batches' extremes, as it was after training.

    Before it has seen a batch in training mode it changes nothing.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, momentum: float = 0.99):
        super().__init__()
        self.bits, self.momentum = bits, momentum
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Moves the range towards that of x; the first batch sets it. A range always holds 0."""
        low, high = x.amin().float().clamp(max=0), x.amax().float().clamp(min=0)
        share = torch.where(self.high > self.low, 1 - self.momentum, 1.0)
        self.low.lerp_(low, share)
        self.high.lerp_(high, share)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x)
        low, high = self.low.to(x.dtype), self.high.to(x.dtype)
        return straight_through(x, lambda v: torch.where(high > low, fake_quantise(v, low, high, self.bits), v))

    def extra_repr(self) -> str:
        return f"bits={self.bits}, momentum={self.momentum}"


def _quantise_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return layer.input_quantiser(inputs[0]), *inputs[1:]


def fake_quantise_layer_(layer: nn.Module, weight_bits: int, activation_bits: int, momentum: float = 0.99) -> None:
    """Quantises a layer's `weight` and its first input from now on."""
    parametrize.register_parametrization(layer, "weight", WeightQuantiser(weight_bits))
    layer.input_quantiser = ActivationQuantiser(activation_bits, momentum).to(layer.weight.device)
    layer.register_forward_pre_hook(_quantise_input)


def fake_quantised(
    model: nn.Module, weight_bits: int = 4, activation_bits: int = 8, first_bits: int = 8, momentum: float = 0.99
) -> nn.Module:
    """A copy whose convolutions and linear layers compute in low precision; the first one's weights get `first_bits`.

    A batch norm behind a layer scales whole channels, which a range per channel follows, so that folding it first
    would change nothing.
    """
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for i, layer in enumerate(layers):
        fake_quantise_layer_(layer, weight_bits if i else first_bits, activation_bits, momentum)
    return model
