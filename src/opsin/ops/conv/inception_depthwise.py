"""Inception depthwise convolution (InceptionNeXt, Yu et al. 2023, arXiv:2303.16900, section 3.2).

A large depthwise kernel is mostly spent on its rim. Here the channels are split four ways: most of them pass unchanged,
and three small groups see a k x k square, a 1 x b band and a b x 1 band:

    y = [x_id, DW_kxk(x_hw), DW_1xb(x_w), DW_bx1(x_h)],   C = (C - 3g) + g + g + g,   g = ratio * C

so the cost per pixel is g (k^2 + 2 b): linear in the band, where a square of that side is quadratic.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class InceptionDepthwiseConv(nn.Module):
    """(N, C, H, W) -> the same.

    Args: square_size k and band_size b in pixels, both odd; branch_ratio g/C.
    """

    def __init__(self, dim: int, square_size: int = 3, band_size: int = 11, branch_ratio: float = 0.125):
        super().__init__()
        g, b = int(dim * branch_ratio), band_size
        self.dwconv_hw = nn.Conv2d(g, g, square_size, padding=square_size // 2, groups=g)
        self.dwconv_w = nn.Conv2d(g, g, (1, b), padding=(0, b // 2), groups=g)
        self.dwconv_h = nn.Conv2d(g, g, (b, 1), padding=(b // 2, 0), groups=g)
        self.split = (dim - 3 * g, g, g, g)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        same, hw, w, h = x.split_with_sizes(self.split, dim=1)
        return torch.cat((same, self.dwconv_hw(hw), self.dwconv_w(w), self.dwconv_h(h)), dim=1)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The same as one b x b depthwise convolution: a delta, a centred square, and the two centre bands."""
        b = self.dwconv_w.kernel_size[1]
        kernel = x.new_zeros(sum(self.split), 1, b, b)
        bias = x.new_zeros(sum(self.split))
        kernel[: self.split[0], 0, b // 2, b // 2] = 1
        start = self.split[0]
        for conv in (self.dwconv_hw, self.dwconv_w, self.dwconv_h):
            height, width = conv.kernel_size
            top, left = (b - height) // 2, (b - width) // 2
            rows = slice(start, start + conv.out_channels)
            kernel[rows, :, top : top + height, left : left + width] = conv.weight
            bias[rows] = conv.bias
            start += conv.out_channels
        return F.conv2d(x, kernel, bias, padding=b // 2, groups=len(bias))
