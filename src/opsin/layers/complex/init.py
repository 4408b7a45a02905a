"""Initial values of complex weights. Both rules give every complex weight the variance that the real rule gives."""

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def kaiming_parts_(weight: Tensor, a: float = math.sqrt(5)) -> Tensor:
    """PyTorch's own default, U(-b, b) with b = gain sqrt(3 / fan_in), on both parts, each smaller by sqrt 2.

    Without the sqrt 2 a complex layer starts with twice the power of the real one.
    """
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)
    bound = nn.init.calculate_gain("leaky_relu", a) * math.sqrt(3 / fan_in) / math.sqrt(2)
    torch.view_as_real(weight).uniform_(-bound, bound)
    return weight


@torch.no_grad()
def trabelsi_(weight: Tensor, criterion: str = "he") -> Tensor:
    """A magnitude from the Rayleigh distribution and a uniform phase (Trabelsi et al. 2018, 1705.09792, section 3.6).

    criterion: "he" for a mean square of 2 / fan_in, "glorot" for 2 / (fan_in + fan_out).
    """
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(weight)
    scale = 1 / math.sqrt(fan_in if criterion == "he" else fan_in + fan_out)
    magnitude = scale * torch.sqrt(-2 * torch.log1p(-torch.rand(weight.shape)))
    phase = math.pi * (2 * torch.rand(weight.shape) - 1)
    return weight.copy_(torch.polar(magnitude, phase))
