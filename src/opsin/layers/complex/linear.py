"""Complex convolutions and linear maps: PyTorch's own modules with complex weights.

With W = A + iB and z = u + iv they compute (A*u - B*v) + i(B*u + A*v), for which PyTorch uses three real convolutions.
Every option of the real module is there. Weights are single complex tensors, which count as two real parameters each.
"""

import math
from functools import partialmethod

import torch
from torch import Tensor, nn

from opsin.layers.complex.init import kaiming_parts_


class ComplexWeights:
    """Mixed in before a module of PyTorch: complex weights, with the parts' own initial values."""

    weight: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        kaiming_parts_(self.weight)
        if self.bias is not None:
            fan_in, _ = nn.init._calculate_fan_in_and_fan_out(self.weight)
            bound = 1 / math.sqrt(2 * fan_in)
            torch.view_as_real(self.bias).uniform_(-bound, bound)


class ComplexConv1d(ComplexWeights, nn.Conv1d):
    """(N, C, L) complex -> (N, C', L') complex."""

    __init__ = partialmethod(nn.Conv1d.__init__, dtype=torch.cfloat)


class ComplexConv2d(ComplexWeights, nn.Conv2d):
    """(N, C, H, W) complex -> (N, C', H', W') complex."""

    __init__ = partialmethod(nn.Conv2d.__init__, dtype=torch.cfloat)


class ComplexConv3d(ComplexWeights, nn.Conv3d):
    """(N, C, D, H, W) complex -> (N, C', D', H', W') complex."""

    __init__ = partialmethod(nn.Conv3d.__init__, dtype=torch.cfloat)


class ComplexConvTranspose1d(ComplexWeights, nn.ConvTranspose1d):
    """(N, C, L) complex -> (N, C', L') complex."""

    __init__ = partialmethod(nn.ConvTranspose1d.__init__, dtype=torch.cfloat)


class ComplexConvTranspose2d(ComplexWeights, nn.ConvTranspose2d):
    """(N, C, H, W) complex -> (N, C', H', W') complex."""

    __init__ = partialmethod(nn.ConvTranspose2d.__init__, dtype=torch.cfloat)


class ComplexConvTranspose3d(ComplexWeights, nn.ConvTranspose3d):
    """(N, C, D, H, W) complex -> (N, C', D', H', W') complex."""

    __init__ = partialmethod(nn.ConvTranspose3d.__init__, dtype=torch.cfloat)


class ComplexLinear(ComplexWeights, nn.Linear):
    """(..., C) complex -> (..., C') complex."""

    __init__ = partialmethod(nn.Linear.__init__, dtype=torch.cfloat)
