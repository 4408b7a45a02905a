"""Pooling of complex maps. Averages act on the parts; a maximum needs an order, which complex numbers do not have."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.layers.complex.activation import by_parts

Sizes = int | Sequence[int]
MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class PartsMaxPool(nn.Module):
    """The largest real and the largest imaginary part of a window, which may come from different places.

    (N, C, spatial) complex of 1 to 3 spatial axes, as the package does it.
    """

    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0):
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, z: Tensor) -> Tensor:
        return by_parts(MAX[z.ndim - 2], z, self.kernel_size, self.stride, self.padding)


class MagnitudeMaxPool(PartsMaxPool):
    """The element of a window with the largest magnitude: commutes with a phase turned everywhere."""

    def forward(self, z: Tensor) -> Tensor:
        pool = MAX[z.ndim - 2]
        magnitude = z.detach().abs()
        winners, places = pool(magnitude, self.kernel_size, self.stride, self.padding, return_indices=True)
        return torch.gather(z.flatten(2), 2, places.flatten(2)).view(winners.shape)


class ComplexAvgPool(nn.Module):
    """The mean of a window."""

    def __init__(self, kernel_size: Sizes, stride: Sizes | None = None, padding: Sizes = 0):
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding

    def forward(self, z: Tensor) -> Tensor:
        return by_parts(AVERAGE[z.ndim - 2], z, self.kernel_size, self.stride, self.padding)


class ComplexAdaptiveAvgPool(nn.Module):
    """Means over as many windows as `output_size` says."""

    def __init__(self, output_size: Sizes):
        super().__init__()
        self.output_size = output_size

    def forward(self, z: Tensor) -> Tensor:
        return by_parts(ADAPTIVE[z.ndim - 2], z, self.output_size)


class ComplexDropout(nn.Module):
    """Drops numbers, not parts: both parts of an element share one mask, drawn anew for each of the first `axes` axes.

    axes: None for a mask per element; 2 for whole channels, as nn.Dropout2d does.
    """

    def __init__(self, p: float = 0.5, axes: int | None = None):
        super().__init__()
        self.p, self.axes = p, axes

    def forward(self, z: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return z
        kept = z.shape if self.axes is None else (*z.shape[: self.axes], *[1] * (z.ndim - self.axes))
        return z * F.dropout(torch.ones(kept, device=z.device), self.p)
