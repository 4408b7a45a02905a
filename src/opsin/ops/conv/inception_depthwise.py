"""Inception depthwise convolution (InceptionNeXt, Yu et al. 2023, arXiv:2303.16900, section 3.2).

A large depthwise kernel is mostly spent on its rim. Here the channels are split four ways: most of them pass unchanged,
and three small groups see a k x k square, a 1 x b band and a b x 1 band:

    y = [x_id, DW_kxk(x_hw), DW_1xb(x_w), DW_bx1(x_h)],   C = (C - 3g) + g + g + g,   g = ratio * C

so the cost per pixel is g (k^2 + 2 b): linear in the band, where a square of that side is quadratic. On a processor a
small map takes less time than it takes to call three convolutions; there the three, padded to b x b, are one.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from opsin.errors import BadInput
from opsin.layers.kept import Kept, may_keep
from opsin.layers.readers import quiet
from opsin.ops import native

FEW = 8e6  # multiply-adds that a processor does in the time of two calls of a convolution


class InceptionDepthwiseConv(nn.Module):
    """(N, C, H, W) -> the same.

    Args: square_size k and band_size b in pixels, both odd; branch_ratio g/C.
    Raises BadInput: an even size, or branches without channels or of more than a third of them.
    """

    def __init__(self, dim: int, square_size: int = 3, band_size: int = 11, branch_ratio: float = 0.125):
        super().__init__()
        g, b = int(dim * branch_ratio), band_size
        if square_size % 2 == 0 or b % 2 == 0:
            raise BadInput(
                f"square_size={square_size} and band_size={b}: both must be odd, so that kernels have a middle"
            )
        if not 0 < 3 * g <= dim:
            raise BadInput(f"branch_ratio={branch_ratio} of dim={dim} makes three branches of {g} channels each")
        self.dwconv_hw = nn.Conv2d(g, g, square_size, padding=square_size // 2, groups=g)
        self.dwconv_w = nn.Conv2d(g, g, (1, b), padding=(0, b // 2), groups=g)
        self.dwconv_h = nn.Conv2d(g, g, (b, 1), padding=(b // 2, 0), groups=g)
        self.split = (dim - 3 * g, g, g, g)
        self._kept = Kept()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if self._has_few(x):
            same, rest = x.split_with_sizes((self.split[0], 3 * self.split[1]), dim=1)
            return torch.cat((same, _convolved(rest, *self._kept(None, list(self.parameters()), self.merged))), dim=1)
        same, hw, w, h = x.split_with_sizes(self.split, dim=1)
        return torch.cat((same, self.dwconv_hw(hw), self.dwconv_w(w), self.dwconv_h(h)), dim=1)

    def merged(self) -> tuple[Float[Tensor, "three_g 1 b b"], Float[Tensor, " three_g"]]:
        """Kernels and biases of the three branches as those of one: zeros around what is smaller than b x b."""
        branches = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        b = max(side for conv in branches for side in conv.kernel_size)
        ends = ([(b - side) // 2 for side in reversed(conv.kernel_size) for _ in range(2)] for conv in branches)
        kernels = [F.pad(conv.weight, end) for conv, end in zip(branches, ends)]
        return torch.cat(kernels), torch.cat([cast(Tensor, conv.bias) for conv in branches])

    def _has_few(self, x: Float[Tensor, "n c h w"]) -> bool:
        """Whether one call is faster and nobody would miss the three: at inference, with branches that are as made."""
        return (
            native.takes(x)
            and 3 * self.split[1] * self.dwconv_w.kernel_size[1] ** 2 * x.numel() <= FEW * x.shape[1]
            and x.is_contiguous()
            and may_keep(self, x)
            and not is_in_torch_dispatch_mode()  # which counts multiply-adds, say
            and all(map(_as_made, (self.dwconv_hw, self.dwconv_w, self.dwconv_h)))
        )

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The same as one b x b depthwise convolution: a delta, a centred square, and the two centre bands."""
        weight, bias = self.merged()
        delta = weight.new_zeros(self.split[0], *weight.shape[1:])
        delta[..., weight.shape[2] // 2, weight.shape[3] // 2] = 1
        return _convolved(x, torch.cat((delta, weight)), torch.cat((bias.new_zeros(self.split[0]), bias)))


def _convolved(x: Float[Tensor, "n c h w"], weight: Float[Tensor, "c 1 b b"], bias: Tensor) -> Float[Tensor, "n c h w"]:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))


def _as_made(conv: nn.Module) -> bool:
    if type(conv) is not nn.Conv2d or not quiet(conv) or conv.bias is None:
        return False
    middle = tuple(side // 2 for side in conv.kernel_size)
    found = (conv.groups, conv.stride, conv.dilation, conv.padding, conv.padding_mode)
    return found == (len(conv.weight), (1, 1), (1, 1), middle, "zeros")
