"""Complex activations. None is both bounded and analytic, so each gives something up: the phase, or analyticity.

|z| has no gradient at 0; where it occurs its square gets `EPS` squared added.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


def by_parts(function: Callable[..., Tensor], z: Tensor, *args: object) -> Tensor:
    """f(Re z) + i f(Im z)."""
    return torch.complex(function(z.real, *args), function(z.imag, *args))


def magnitude(z: Tensor) -> Tensor:
    """|z|, with a gradient of 0 at 0."""
    return torch.sqrt(z.real.square() + z.imag.square() + EPS**2)


class CReLU(nn.Module):
    """ReLU of both parts (Trabelsi et al. 2018, eq. 4)."""

    def forward(self, z: Tensor) -> Tensor:
        return by_parts(F.relu, z)


class ZReLU(nn.Module):
    """z where its phase is inside (0, pi/2), else 0 (Guberman 2016). Of white noise three quarters vanish."""

    def forward(self, z: Tensor) -> Tensor:
        return z * ((z.real > 0) & (z.imag > 0))


class ModReLU(nn.Module):
    """ReLU(|z| + b) z / |z|: the phase stays, a disk of radius -b vanishes (Arjovsky et al. 2016, eq. 8).

    channels: one b per channel (axis 1), or 1 for a common one; b starts at `bias`.
    """

    def __init__(self, channels: int = 1, bias: float = 0.0):
        super().__init__()
        self.bias = nn.Parameter(torch.full((channels,), bias))

    def forward(self, z: Tensor) -> Tensor:
        r = magnitude(z)
        return z * (F.relu(r + _per_channel(self.bias, z)) / r)


class CModReLU(nn.Module):
    """z ReLU(1 - tau / |z|), which is ModReLU as a shrinkage (Scardapane et al. 2018). tau is learned, per channel."""

    def __init__(self, channels: int = 1, threshold: float = 0.1):
        super().__init__()
        self.threshold = nn.Parameter(torch.full((channels,), threshold))

    def forward(self, z: Tensor) -> Tensor:
        return z * F.relu(1 - _per_channel(self.threshold, z) / magnitude(z))


class CSiLU(nn.Module):
    """z sigmoid(|z|)."""

    def forward(self, z: Tensor) -> Tensor:
        return z * magnitude(z).sigmoid()


class ComplexTanh(nn.Module):
    """The analytic tanh, (sinh 2u + i sin 2v) / (cosh 2u + cos 2v); the package writes sin 2u, which is not it."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z)


class ComplexSigmoid(nn.Module):
    """The sigmoid of both parts."""

    def forward(self, z: Tensor) -> Tensor:
        return by_parts(torch.sigmoid, z)


class MagnitudeSoftmax(nn.Module):
    """softmax(|z|) over `dim`: real probabilities."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, z: Tensor) -> Tensor:
        return magnitude(z).softmax(self.dim)


def _per_channel(values: Tensor, z: Tensor) -> Tensor:
    return values.view(-1, *[1] * (z.ndim - 2)) if len(values) > 1 else values
