"""Im2win's matrix product on CUDA: tiles of filters times tiles of windows, read from the window-ordered copy.

Arxiv:2306.14316, section III-B: the product has one row per filter, one column per output position of the batch, and
the depth C k_w k_h. A program computes one tile; windows and filters go through shared memory in slices of `BLOCK_K`
with several slices in flight (the paper's double buffering and prefetching), and sums stay in registers in float32.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from opsin.ops.kernels import launching_on

BLOCK_M, BLOCK_P, BLOCK_K = 64, 64, 32


@triton.jit
def _window_product(
    windows, filters, bias, out, count, positions, depth, out_height, out_width,
    stride_n, stride_c, stride_i, stride_j, run,
    WITH_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = p // out_width
    sample = (row // out_height).to(tl.int64)
    start = sample * stride_n + (row % out_height) * stride_i + (p % out_width) * stride_j
    total = tl.zeros((BLOCK_M, BLOCK_P), dtype=tl.float32)
    for first in range(0, depth, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        channel = k // run
        place = channel * stride_c + (k - channel * run)
        taps = tl.load(
            filters + m[:, None] * depth + k[None, :], mask=(m < count)[:, None] & (k < depth)[None, :], other=0.0
        )
        values = tl.load(
            windows + start[None, :] + place[:, None], mask=(k < depth)[:, None] & (p < positions)[None, :], other=0.0
        )
        total = tl.dot(taps, values, total, input_precision="ieee")
    if WITH_BIAS:
        total += tl.load(bias + m, mask=m < count, other=0.0).to(tl.float32)[:, None]
    area = out_height * out_width
    target = out + (sample * count * area + p % area)[None, :] + m.to(tl.int64)[:, None] * area
    tl.store(target, total.to(out.dtype.element_ty), mask=(m < count)[:, None] & (p < positions)[None, :])


def window_product(
    windows: Float[Tensor, "n c i w t"],
    filters: Float[Tensor, "m c u t"],
    bias: Float[Tensor, " m"] | None,
    stride: int,
) -> Float[Tensor, "n m i j"]:
    """The convolution from contiguous windows and filters, both columns first; `stride` is the horizontal one."""
    n, channels, height, width, taps = windows.shape
    count, columns = filters.shape[0], filters.shape[2]
    out_width = (width - columns) // stride + 1
    out = torch.empty(n, count, height, out_width, device=windows.device, dtype=windows.dtype)
    positions = n * height * out_width
    grid = (triton.cdiv(positions, BLOCK_P), triton.cdiv(count, BLOCK_M))
    with launching_on(windows):
        _window_product[grid](
            windows, filters, out if bias is None else bias, out, count, positions, channels * columns * taps, height,
            out_width, *windows.stride()[:3], stride * taps, columns * taps,
            WITH_BIAS=bias is not None, BLOCK_M=BLOCK_M, BLOCK_P=BLOCK_P, BLOCK_K=BLOCK_K, num_warps=4, num_stages=3,
        )  # fmt: skip
    return out
