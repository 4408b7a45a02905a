"""Depthwise convolution: one k x k filter per channel, no mixing of channels. The yardstick of the room."""

from torch import nn


class DepthwiseConv(nn.Conv2d):
    """(N, C, H, W) -> the same at stride 1, `dim` filters of `kernel_size` x `kernel_size`, 'same' zero padding."""

    def __init__(self, dim: int, kernel_size: int = 7, dilation: int = 1, bias: bool = True, stride: int = 1):
        padding = dilation * (kernel_size // 2)
        super().__init__(dim, dim, kernel_size, stride, padding, dilation=dilation, groups=dim, bias=bias)
