"""Im2win: convolution as a matrix product, from a copy of the input that stores overlapping windows once.

Lu, Chu et al. 2023, "Im2win: An Efficient Convolution Paradigm on GPU", arXiv:2306.14316. Im2col copies every k x k
window, so that each input value is stored k^2 times. Im2win copies, for every output row i, the k_h input rows that the
row needs, interleaved column by column (section III-A; stride s, map H x W after padding):

    I~[n, c, i, w, h] = I[n, c, s i + h, w],       I~: (N, C, H_o, W, k_h),       F~[m, c, w, h] = F[m, c, h, w]
    O[n, m, i, j] = sum_c < I~[n, c, i].flatten()[s j k_h : s j k_h + k_h k_w],  F~[m, c].flatten() >

Every window is a contiguous run, runs of neighbours overlap in memory, and the copy is k_w W_o / W times smaller than
im2col's, about k_w / s.

On the CPU the channels are the innermost axis, (N, H_o, W, k_h, C): of the same size, and the run now holds a window of
all channels. Overlapping runs are no matrix for BLAS, but s columns of a run and the s columns of the next one do not
overlap: the copy itself, read with rows of s k_h C values and starting q rows later, is the matrix of the q-th s
columns of all windows. The convolution is thus ceil(k_w / s) ordinary matrix products on shifted views of one buffer,
and nothing is copied again. On CUDA one kernel computes tiles of the product from the layout of the paper.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opsin.errors import BadInput, UnknownName
from opsin.ops.kernels import kernel_wanted, require_kernel

Backend = Literal["auto", "plain", "triton"]
BACKENDS = get_args(Backend)
Pair = tuple[int, int]


class Layer(NamedTuple):
    """One convolution of the paper's benchmark (table II): a square map, no padding, batches of 128."""

    channels: int
    size: int
    filters: int
    kernel: int
    stride: int

    @property
    def out_size(self) -> int:
        return (self.size - self.kernel) // self.stride + 1


LAYERS = {
    "conv1": Layer(3, 227, 96, 11, 4),
    "conv2": Layer(3, 231, 96, 11, 4),
    "conv3": Layer(3, 227, 64, 7, 2),
    "conv4": Layer(64, 224, 64, 7, 2),
    "conv5": Layer(96, 24, 256, 5, 1),
    "conv6": Layer(256, 12, 512, 3, 1),
    "conv7": Layer(3, 224, 64, 3, 1),
    "conv8": Layer(64, 112, 128, 3, 1),
    "conv9": Layer(64, 56, 64, 3, 1),
    "conv10": Layer(128, 28, 128, 3, 1),
    "conv11": Layer(256, 14, 256, 3, 1),
    "conv12": Layer(512, 7, 512, 3, 1),
}


def out_size(size: Sequence[int], kernel: Pair, stride: Pair) -> Pair:
    """(H_o, W_o) of a padded map of (H, W). Raises BadInput where the window does not fit in."""
    if size[0] < kernel[0] or size[1] < kernel[1]:
        raise BadInput(
            f"a {kernel[0]}x{kernel[1]} window does not fit into a map of {size[0]}x{size[1]} (padding included); "
            "take a smaller kernel_size or more padding"
        )
    return (size[0] - kernel[0]) // stride[0] + 1, (size[1] - kernel[1]) // stride[1] + 1


def im2win_numel(shape: Sequence[int], kernel: Pair, stride: Pair) -> int:
    """Values in the window-ordered copy of a padded input of shape (N, C, H, W): N C H_o W k_h."""
    samples, channels, *size = shape
    return samples * channels * out_size(size, kernel, stride)[0] * size[1] * kernel[0]


def im2col_numel(shape: Sequence[int], kernel: Pair, stride: Pair) -> int:
    """Values in im2col's copy: N C k_h k_w H_o W_o."""
    samples, channels, *size = shape
    height, width = out_size(size, kernel, stride)
    return samples * channels * kernel[0] * kernel[1] * height * width


def image_to_windows(x: Float[Tensor, "n c h w"], kernel_height: int, stride: int) -> Float[Tensor, "n c i w t"]:
    """I~ in the order of the paper, contiguous; t = k_h. `x` is padded already."""
    return x.unfold(2, kernel_height, stride).contiguous()


def filters_to_windows(weight: Float[Tensor, "m c t u"]) -> Float[Tensor, "m c u t"]:
    """F~: columns outside, as in the windows."""
    return weight.transpose(2, 3).contiguous()


def window_view(windows: Float[Tensor, "n c i w t"], kernel_width: int, stride: int) -> Float[Tensor, "n c i j u t"]:
    """Every window of `image_to_windows` as a view, u = k_w. Reshaping it would make im2col's copy."""
    n, c, i, w, t = windows.shape
    size = (n, c, i, (w - kernel_width) // stride + 1, kernel_width, t)
    return windows.as_strided(size, (*windows.stride()[:3], stride * t, t, 1))


def channels_last_windows(x: Float[Tensor, "n c h w"], kernel_height: int, stride: int) -> Float[Tensor, "n i w t c"]:
    """The same values with the channels innermost, contiguous."""
    rows = (x.shape[2] - kernel_height) // stride + 1
    last = x.permute(0, 2, 3, 1).contiguous()
    windows = x.new_empty(x.shape[0], rows, x.shape[3], kernel_height, x.shape[1])
    for tap in range(kernel_height):
        windows[:, :, :, tap] = last[:, tap : tap + stride * (rows - 1) + 1 : stride]
    return windows


def contract(
    windows: Float[Tensor, "n i w t c"], weight: Float[Tensor, "m c t u"], bias: Float[Tensor, " m"] | None, stride: int
) -> Float[Tensor, "n m i j"]:
    """The convolution as ceil(u / stride) matrix products on views of the windows, channels last in memory.

    Where the stride divides the width, rows of all images form one matrix; at the ends of rows it computes a few values
    that belong to no window, which the result leaves out. Otherwise each row is a matrix of its own.
    """
    n, height, width, taps, channels = windows.shape
    filters, columns = weight.shape[0], weight.shape[3]
    column, step, out_width = taps * channels, stride * taps * channels, (width - columns) // stride + 1
    whole = width % stride == 0
    slots = width // stride if whole else out_width
    matrices, rows = (1, n * height * slots - (columns - 1) // stride) if whole else (n * height, slots)
    bank = weight.permute(0, 3, 2, 1).reshape(filters, columns * column).T
    out = windows.new_zeros(n * height * slots, filters) if bias is None else bias.repeat(n * height * slots, 1)
    target = out[: matrices * rows].view(matrices, rows, filters)
    for first in range(0, columns, stride):
        depth = min(stride, columns - first) * column
        view = windows.as_strided((matrices, rows, depth), (width * column, step, 1), first * column)
        target.baddbmm_(view, bank[first * column :][:depth].expand(matrices, -1, -1))
    return out.view(n, height, slots, filters)[:, :, :out_width].permute(0, 3, 1, 2)


def im2col_conv2d(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "m c t u"], bias: Float[Tensor, " m"] | None, stride: Pair,
    padding: Pair,
) -> Float[Tensor, "n m i j"]:  # fmt: skip
    """What im2win is measured against: every window copied, then one matrix product."""
    kernel = weight.shape[2], weight.shape[3]
    size = out_size([side + 2 * pad for side, pad in zip(x.shape[2:], padding)], kernel, stride)
    y = weight.flatten(1) @ F.unfold(x, kernel, padding=padding, stride=stride)
    return (y if bias is None else y + bias[:, None]).unflatten(2, size)


def _padded(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """The input with its zeros around it, large enough for a window."""
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    out_size(padded.shape[2:], kernel, stride)
    return padded


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    height, width = weight.shape[2:]
    padded = _padded(x, (height, width), stride, padding)
    return contract(channels_last_windows(padded, height, stride[0]), weight, bias, stride[1])


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair) -> Tensor:
    from opsin.ops.conv.im2win_triton import window_product

    height, width = weight.shape[2:]
    padded = _padded(x, (height, width), stride, padding)
    return window_product(image_to_windows(padded, height, stride[0]), filters_to_windows(weight), bias, stride[1])


class Im2winFunction(torch.autograd.Function):
    """A forward pass by im2win with the gradients of any convolution; only input and filters are kept for them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair, kernel: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.bias = stride, padding, bias is not None
        return (_triton if kernel else _plain)(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, [len(weight)] if ctx.bias else None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1,
            ctx.needs_input_grad[:3],
        )  # fmt: skip
        return *grads, None, None, None


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Under autocast all three in its type, but for float64, as PyTorch's own convolution takes them."""
    device = x.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
    return x, weight, bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)


def im2win_conv2d(
    x: Float[Tensor, "n c h w"], weight: Float[Tensor, "m c t u"], bias: Float[Tensor, " m"] | None = None,
    stride: Pair = (1, 1), padding: Pair = (0, 0), backend: Backend = "auto",
) -> Float[Tensor, "n m i j"]:  # fmt: skip
    """`F.conv2d` without groups and dilation.

    backend: "plain" multiplies views of the channels-last windows, "triton" runs the tiled kernel, "auto" takes the
    kernel on CUDA. On the meta device the definition runs, so that its multiplications are counted. Autocast is obeyed.
    Raises BadInput: the maps do not fit the filters, the window does not fit, or the kernel cannot run. UnknownName:
    the backend.
    """
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    if x.ndim != 4 or x.shape[1] != weight.shape[1]:
        shape = "x".join(map(str, x.shape))
        raise BadInput(f"im2win takes maps (N, C, H, W) of C = {weight.shape[1]} channels, not a tensor of {shape}")
    if backend == "triton":
        require_kernel(x)
    x, weight, bias = _cast(x, weight, bias)
    if torch.compiler.is_compiling():
        return _plain(x, weight, bias, stride, padding)
    if x.is_meta or len(x) == 0:
        return im2col_conv2d(x, weight, bias, stride, padding)
    kernel = backend == "triton" or (backend == "auto" and kernel_wanted(x))
    return Im2winFunction.apply(x, weight, bias, stride, padding, kernel)


class Im2winConv2d(nn.Conv2d):
    """(N, C, H, W) -> (N, M, H_o, W_o): an ordinary dense convolution, computed by im2win. Loads nn.Conv2d's state.

    Args:
        kernel_size, stride: taps and pixels, one number or (height, width).
        padding: zeros on each side, by default half of the kernel ('same' at stride 1 for odd kernels).
        out_dim: M, by default as many as come in.
        backend: see `im2win_conv2d`.
    Raises BadInput: padding is a word. UnknownName: the backend.
    """

    def __init__(
        self, dim: int, kernel_size: int | Pair = 3, stride: int | Pair = 1, padding: int | Pair | None = None,
        out_dim: int | None = None, bias: bool = True, backend: Backend = "auto",
    ):  # fmt: skip
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        same = (kernel[0] // 2, kernel[1] // 2)
        if isinstance(padding, str):
            raise BadInput(f'padding="{padding}" is not in pixels; give a number, or nothing for half of the kernel')
        super().__init__(dim, out_dim or dim, kernel, stride, same if padding is None else padding, bias=bias)
        if backend not in BACKENDS:
            raise UnknownName("backend", backend, BACKENDS)
        self.backend: Backend = backend

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m i j"]:
        return im2win_conv2d(x, self.weight, self.bias, self.stride, self.padding, self.backend)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m i j"]:
        """The same by im2col."""
        return im2col_conv2d(x, self.weight, self.bias, self.stride, self.padding)
