"""Sub-pixel convolution: up-sampling by a convolution at low resolution and a shuffle (Shi et al. 2016, 1609.05158).

A stride-1 convolution computes C r^2 channels; r^2 of them are the r x r output pixels of each input pixel. It is a
transposed convolution of stride r whose kernel has been taken apart, without the zeros between the pixels.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class SubPixelConv2d(nn.Conv2d):
    """Convolution to out_channels * scale^2 channels, then periodic shuffling: (n, c, h, w) -> (n, out, h*r, w*r).

    icnr: start with the r^2 kernels of an output channel equal, so that the first outputs show no checkerboard (Aitken
        et al. 2017, 1707.02937).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, scale: int, *, icnr: bool = False):
        super().__init__(in_channels, out_channels * scale**2, kernel_size, padding=kernel_size // 2)
        self.scale = scale
        if icnr:
            with torch.no_grad():
                for tensor in (self.weight, self.bias):
                    assert tensor is not None
                    tensor.copy_(tensor[:: scale**2].repeat_interleave(scale**2, 0))

    def low_resolution(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n outr2 h w"]:
        """The convolution alone; against `pixel_unshuffle(target, r)` it has the loss of the shuffled output."""
        return super().forward(x)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n out hr wr"]:
        return F.pixel_shuffle(self.low_resolution(x), self.scale)


def transposed(conv: SubPixelConv2d) -> nn.ConvTranspose2d:
    """The same function as one transposed convolution of stride r and kernel k r: w[a + r(k-1-u)] = W_a[u] per axis."""
    r, k = conv.scale, conv.kernel_size[0]
    out = conv.out_channels // r**2
    result = nn.ConvTranspose2d(conv.in_channels, out, k * r, stride=r, padding=r * (k // 2)).to(conv.weight)
    weight = conv.weight.detach().reshape(out, r, r, conv.in_channels, k, k).flip(-1, -2)
    with torch.no_grad():  # (out, a, b, in, u, v) -> (in, out, u a, v b)
        result.weight.copy_(weight.permute(3, 0, 4, 1, 5, 2).reshape(conv.in_channels, out, k * r, k * r))
        assert conv.bias is not None and result.bias is not None
        biases = conv.bias.detach().reshape(out, r**2)
        if not torch.equal(biases, biases[:, :1].expand_as(biases)):
            raise ValueError(
                "a transposed convolution has one bias per output channel; this layer has one per sub-pixel"
            )
        result.bias.copy_(biases[:, 0])
    return result


def paper_order(out_channels: int, scale: int) -> Int[Tensor, " outr2"]:
    """Where each of PyTorch's shuffle channels lies in the order of the paper's equation 4: `weight[paper_order(C, r)]`
    is what weights written for that order become here.

    PyTorch: channel c r^2 + r a + b is the sub-pixel in row a, column b. Paper: C r b + C a + c (c fastest).
    """
    c, a, b = torch.meshgrid(torch.arange(out_channels), torch.arange(scale), torch.arange(scale), indexing="ij")
    return (out_channels * scale * b + out_channels * a + c).flatten()
