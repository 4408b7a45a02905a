"""Resizing of complex maps: PyTorch's modes on both parts, or band-limited through the Fourier domain."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.complex.activation import by_parts


def sinc_resize(z: Tensor, size: Sequence[int]) -> Tensor:
    """Periodic sinc interpolation of the last len(size) axes: the spectrum is padded with zeros, or cut.

    Exact for signals without frequencies beyond the smaller of both grids. Where the smaller side is even, its Nyquist
    frequency is split between both signs (when growing), or both are added (when shrinking), as in scipy's
    `resample`.
    """
    for axis, new in zip(range(-len(size), 0), size, strict=True):
        old = z.shape[axis]
        if new == old:
            continue
        spectrum, low = torch.fft.fft(z, dim=axis).movedim(axis, -1), min(old, new)
        head, tail = spectrum[..., : (low + 1) // 2], spectrum[..., old - (low - 1) // 2 :]
        parts = [head]
        if low % 2 == 0:
            middle = spectrum[..., low // 2 : low // 2 + 1]
            if new < old:
                parts.append(middle + spectrum[..., old - low // 2 : old - low // 2 + 1])
            else:
                parts.append(middle / 2)
        gap = new - low - (1 if low % 2 == 0 and new > old else 0)
        parts.append(head.new_zeros(*head.shape[:-1], max(gap, 0)))
        if low % 2 == 0 and new > old:
            parts.append(middle / 2)
        z = torch.fft.ifft(torch.cat((*parts, tail), -1) * (new / old), dim=-1).movedim(-1, axis)
    return z


class ComplexUpsample(nn.Module):
    """(N, C, spatial) complex -> the same at another size.

    Args: size, or scale_factor; mode "sinc" (Fourier domain), or one of `torch.nn.functional.interpolate` on the parts.
    Raises BadInput where neither or both of size and scale_factor are given.
    """

    def __init__(self, size: Sequence[int] | None = None, scale_factor: float | None = None, mode: str = "sinc"):
        super().__init__()
        if (size is None) == (scale_factor is None):
            raise BadInput("ComplexUpsample takes either size or scale_factor; give exactly one of them")
        self.size, self.scale_factor, self.mode = size, scale_factor, mode

    def forward(self, z: Tensor) -> Tensor:
        if self.mode != "sinc":
            return by_parts(F.interpolate, z, self.size, self.scale_factor, self.mode)
        return sinc_resize(z, self.size or [int(side * self.scale_factor) for side in z.shape[2:]])
