"""Filters made by hand under learned mixing: every channel through a fixed bank, then a 1 x 1 convolution.

Of the toolbox `filter_design`: y = M (x * f_1, .., x * f_B) with B fixed k x k filters f and a learned M of C x (C B).
It is a dense convolution whose filters are held to the span of the bank, and is computed so where that is faster;
`fuse()` returns it.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.filter_design import bank as filters_of

DENSE_GAIN = 4  # multiply-adds per second of a dense convolution over those of the two steps, on a processor


class FilterBank(nn.Module):
    """(N, C, H, W) -> the same, 'same' zero padding.

    Args: bank, a key of opsin.layers.filter_design.BANKS; kernel_size, odd; filters, how many of the bank.
    Raises BadInput for an even kernel or a bank with fewer filters, UnknownName.
    """

    def __init__(self, dim: int, bank: str = "dct", kernel_size: int = 3, filters: int = 9):
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; a filter bank needs an odd one")
        with torch.device("cpu"):
            self.register_buffer("bank", filters_of(bank, kernel_size, filters))
        self.mixing = nn.Conv2d(dim * filters, dim, 1, bias=False)
        nn.init.kaiming_normal_(self.mixing.weight, nonlinearity="linear")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if not self.dense:
            return self.reference(x)
        return F.conv2d(x, self.kernel(), padding=self.bank.shape[-1] // 2)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The definition: every channel through the bank, then the mixing."""
        taps = self.bank[:, None].repeat(x.shape[1], 1, 1, 1)
        return self.mixing(F.conv2d(x, taps, padding=self.bank.shape[-1] // 2, groups=x.shape[1]))

    @property
    def dense(self) -> bool:
        """Whether one convolution with the mixed filters beats the two steps, though it may multiply more often."""
        filters, taps = len(self.bank), self.bank[0].numel()
        channels = self.mixing.out_channels
        return channels * taps <= DENSE_GAIN * filters * (taps + channels)

    def kernel(self) -> Float[Tensor, "c c k k"]:
        """The filters of the dense convolution."""
        mixing = self.mixing.weight.flatten(1).unflatten(1, (-1, len(self.bank)))
        return torch.einsum("mcb,bij->mcij", mixing, self.bank)

    def fuse(self) -> nn.Conv2d:
        """The dense convolution itself."""
        kernel = self.kernel().detach()
        conv = nn.Conv2d(*kernel.shape[:2], kernel.shape[-1], padding=kernel.shape[-1] // 2, bias=False)
        conv.weight = nn.Parameter(kernel.clone())
        return conv
