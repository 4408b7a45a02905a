"""Complex convolution on real maps whose channels are two halves: real parts, then imaginary parts.

Chatterjee et al. 2022, "Complex Network for Complex Problems: A comparative study of CNN and Complex-valued CNN",
arXiv:2302.04584. Images of MRI, radar or waves have a phase. A real network sees its parts as two channels and has to
discover how they belong together; a complex weight W = A + iB acts on z = u + iv as complex numbers do,

    W * z = (A*u - B*v) + i (B*u + A*v)

so that turning the phase everywhere turns the output's phase and does nothing else. The same product takes four real
convolutions, done as one with the block matrix [[A, -B], [B, A]], or three after Gauss, with t = (A + B) * (u + v):

    Re = A*u - B*v,   Im = t - A*u - B*v

The rest of the paper's set (norms, activations, pooling, conversion of whole networks) is in `opsin.layers.complex`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.complex.init import kaiming_parts_

GAUSS_FROM = 1024  # channels times taps from which three convolutions beat one of four times the size (measured)


class ComplexConv(nn.Module):
    """(N, C, H, W) real -> (N, C, h, w) real; channels are the halves (Re, Im) of C / 2 complex ones. 'Same' padding.

    Args:
        dim: C, even. kernel_size: odd. stride, dilation: as of a convolution.
        bias: a complex offset; without one the layer commutes with a phase turned everywhere.
    Raises BadInput: an odd number of channels, an even kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1, bias: bool = True):
        super().__init__()
        if dim % 2:
            raise BadInput(
                f"dim={dim} is odd; a complex convolution has real and imaginary halves, so take an even one"
            )
        if kernel_size % 2 == 0:
            raise BadInput(
                f"kernel_size={kernel_size} is even; a complex convolution keeps the centre, so take an odd one"
            )
        self.stride, self.dilation, self.padding = stride, dilation, dilation * (kernel_size // 2)
        self.products = 3 if dim * kernel_size**2 >= GAUSS_FROM else 4
        weight = kaiming_parts_(torch.empty(dim // 2, dim // 2, kernel_size, kernel_size, dtype=torch.cfloat))
        self.weight = nn.Parameter(torch.view_as_real(weight).movedim(-1, 0).contiguous())  # (2, C/2, C/2, k, k)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        return self.gauss(x) if self.products == 3 else self.block(x)

    def block(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """One convolution with [[A, -B], [B, A]]."""
        a, b = self.weight
        matrix = torch.cat((torch.cat((a, -b), 1), torch.cat((b, a), 1)))
        return F.conv2d(x, matrix, self.bias, self.stride, self.padding, self.dilation)

    def gauss(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """Three convolutions of half the channels."""
        (a, b), (u, v) = self.weight, x.chunk(2, 1)
        place = (None, self.stride, self.padding, self.dilation)
        au, bv, t = F.conv2d(u, a, *place), F.conv2d(v, b, *place), F.conv2d(u + v, a + b, *place)
        y = torch.cat((au - bv, t - au - bv), 1)
        return y if self.bias is None else y + self.bias[:, None, None]

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """PyTorch's convolution of complex tensors."""
        bias = None if self.bias is None else torch.complex(*self.bias.chunk(2))
        z, weight = torch.complex(*x.chunk(2, 1)), torch.complex(*self.weight)
        y = F.conv2d(z, weight, bias, self.stride, self.padding, self.dilation)
        return torch.cat((y.real, y.imag), 1)
