"""Neighborhood attention as fused kernels: no logits, no copies of windows; O(n) memory in both directions.

Hassani et al. 2024, arXiv:2403.04690, section 3.3, in Triton. A program owns a tile of queries, a box of consecutive
members of one dilation group (8x8 in two axes), and walks over the boxes of keys between the first window's start and
the last window's end. A box of logits is one matrix product, masked by the rule, and joins the running softmax

    m' = max(m, rowmax S);   l' = l e^(m - m') + rowsum e^(S - m');   O' = O e^(m - m') + e^(S - m') V

Only O / l and the log-sum-exp L = m + log l are stored. Backward computes the logits anew from L:

    P = e^(S - L),   dV = P^T dO,   dS = P o (dO V^T - delta),   delta = rowsum(dO o O),   dQ = s dS K,   dK = s dS^T Q,

one kernel per tile of queries for dQ (and the bias, by atomic addition), one per tile of keys for dK and dV. One and
two axes are three with leading axes of a single token. Exponents are of base 2, as the hardware has them.
"""

from math import e, log2, prod
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsin.errors import BadInput
from opsin.ops.kernels import launching_on

TILES = {1: (1, 1, 64), 2: (1, 8, 8), 3: (4, 4, 4)}  # members per side of a box, by the number of axes; wide heads less
LARGEST_HEAD = 256
TYPES = (torch.float16, torch.bfloat16, torch.float32)


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these types and head sizes."""
    return q.dtype in TYPES and max(q.shape[-1], v.shape[-1]) <= LARGEST_HEAD


@triton.jit
def _window(place, members, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """First member and the one after the last that the query at `place` of its group sees."""
    if CAUSAL:
        start = tl.maximum(place - KERNEL + 1, 0)
        stop = place + 1
    else:
        start = tl.minimum(tl.maximum(place - KERNEL // 2, 0), members - KERNEL)
        stop = start + KERNEL
    return start, stop


@triton.jit
def _seen_by(first, last, members, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """The first query and the one after the last whose windows touch the keys from `first` to `last`."""
    if CAUSAL:
        start = first
        stop = tl.minimum(last + KERNEL, members)
    else:
        start = tl.where(first < KERNEL, 0, first - KERNEL + 1 + KERNEL // 2)
        stop = tl.where(last >= members - KERNEL, members, tl.minimum(last + KERNEL // 2 + 1, members))
    return start, stop


@triton.jit
def _box(number, length, dilation, SIDE: tl.constexpr):
    """Group, first member and the group's size of tile `number` of one axis."""
    count = tl.cdiv(tl.cdiv(length, dilation), SIDE)
    group = number // count
    return group, (number % count) * SIDE, (length - group + dilation - 1) // dilation


@triton.jit
def _boxes(number, length, dilation, TILE: tl.constexpr):
    """The same on all three axes, the last the fastest: groups, first members, sizes."""
    count1 = dilation[1] * tl.cdiv(tl.cdiv(length[1], dilation[1]), TILE[1])
    count2 = dilation[2] * tl.cdiv(tl.cdiv(length[2], dilation[2]), TILE[2])
    g0, f0, m0 = _box(number // (count1 * count2), length[0], dilation[0], TILE[0])
    g1, f1, m1 = _box(number // count2 % count1, length[1], dilation[1], TILE[1])
    g2, f2, m2 = _box(number % count2, length[2], dilation[2], TILE[2])
    return (g0, g1, g2), (f0, f1, f2), (m0, m1, m2)


@triton.jit
def _members(first, group, members, length, dilation, TILE: tl.constexpr):
    """Places of a box's members per axis, their tokens in the flattened space, and which exist."""
    index = tl.arange(0, TILE[0] * TILE[1] * TILE[2])
    p0 = first[0] + index // (TILE[1] * TILE[2])
    p1 = first[1] + index // TILE[2] % TILE[1]
    p2 = first[2] + index % TILE[2]
    row = (p0 * dilation[0] + group[0]) * length[1] + p1 * dilation[1] + group[1]
    token = row * length[2] + p2 * dilation[2] + group[2]
    return (p0, p1, p2), token, (p0 < members[0]) & (p1 < members[1]) & (p2 < members[2])


@triton.jit
def _inside(query, key, members, KERNEL: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether each key is in each query's window; queries and keys are broadcast against each other."""
    start0, stop0 = _window(query[0], members[0], KERNEL[0], CAUSAL[0])
    start1, stop1 = _window(query[1], members[1], KERNEL[1], CAUSAL[1])
    start2, stop2 = _window(query[2], members[2], KERNEL[2], CAUSAL[2])
    near = (key[0] >= start0) & (key[0] < stop0) & (key[1] >= start1) & (key[1] < stop1)
    return near & (key[2] >= start2) & (key[2] < stop2)


@triton.jit
def _offset(query, key, KERNEL: tl.constexpr):
    """Where in a head's table the bias of each pair is."""
    row = (key[0] - query[0] + KERNEL[0] - 1) * (2 * KERNEL[1] - 1) + key[1] - query[1] + KERNEL[1] - 1
    return row * (2 * KERNEL[2] - 1) + key[2] - query[2] + KERNEL[2] - 1


@triton.jit
def _rows(pointer, token, exists, stride, size, BLOCK: tl.constexpr):
    """The vectors of some tokens, zeros where they do not exist."""
    column = tl.arange(0, BLOCK)
    mask = exists[:, None] & (column < size)[None, :]
    return tl.load(pointer + token[:, None].to(tl.int64) * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store(pointer, value, token, exists, stride, size, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = exists[:, None] & (column < size)[None, :]
    place = pointer + token[:, None].to(tl.int64) * stride + column[None, :]
    tl.store(place, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _start(pointer, stride, sample, head):
    """Where a sample's head begins; strides are those of samples, tokens and heads."""
    return pointer + sample.to(tl.int64) * stride[0] + head.to(tl.int64) * stride[2]


@triton.jit
def _range(first, members, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, SIDE: tl.constexpr):
    """First key of a query box along one axis, and how many boxes of keys there are from it to the last."""
    start, _ = _window(first, members, KERNEL, CAUSAL)
    _, stop = _window(tl.minimum(first + SIDE, members) - 1, members, KERNEL, CAUSAL)
    return start, tl.cdiv(tl.maximum(stop - start, 0), SIDE)


@triton.jit
def _range_of_queries(first, members, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, SIDE: tl.constexpr):
    """The same the other way: the queries that see a box of keys."""
    start, stop = _seen_by(first, tl.minimum(first + SIDE, members) - 1, members, KERNEL, CAUSAL)
    return start, tl.cdiv(tl.maximum(stop - start, 0), SIDE)


@triton.jit
def _step(number, start, count1, count2, TILE: tl.constexpr):
    """First members of the box that a walk reaches at its step `number`."""
    first0 = start[0] + number // (count1 * count2) * TILE[0]
    return first0, start[1] + number // count2 % count1 * TILE[1], start[2] + number % count2 * TILE[2]


@triton.jit
def _columns(place):
    return place[0][None, :], place[1][None, :], place[2][None, :]


@triton.jit
def _lines(place):
    return place[0][:, None], place[1][:, None], place[2][:, None]


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, q_stride, k_stride, v_stride, out_stride, length, dilation, tiles,
    heads, scale, dim, dim_v, KERNEL: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2) of one tile of queries of one head."""
    sample, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    group, first, members = _boxes(tl.program_id(0) % tiles, length, dilation, TILE)
    query, token, exists = _members(first, group, members, length, dilation, TILE)
    q = _rows(_start(q_ptr, q_stride, sample, head), token, exists, q_stride[1], dim, BLOCK_D)
    k_head, v_head = _start(k_ptr, k_stride, sample, head), _start(v_ptr, v_stride, sample, head)
    table = bias_ptr + head * (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    start0, count0 = _range(first[0], members[0], KERNEL[0], CAUSAL[0], TILE[0])
    start1, count1 = _range(first[1], members[1], KERNEL[1], CAUSAL[1], TILE[1])
    start2, count2 = _range(first[2], members[2], KERNEL[2], CAUSAL[2], TILE[2])
    highest = tl.full([TILE[0] * TILE[1] * TILE[2]], -1e30, tl.float32)
    total = tl.zeros_like(highest)
    out = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_E], tl.float32)
    for number in range(count0 * count1 * count2):
        box = _step(number, (start0, start1, start2), count1, count2, TILE)
        key, key_token, key_exists = _members(box, group, members, length, dilation, TILE)
        k = _rows(k_head, key_token, key_exists, k_stride[1], dim, BLOCK_D)
        v = _rows(v_head, key_token, key_exists, v_stride[1], dim_v, BLOCK_E)
        near = _inside(_lines(query), _columns(key), members, KERNEL, CAUSAL) & key_exists[None, :]
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if BIASED:
            logits += 1.4426950408889634 * tl.load(table + _offset(_lines(query), _columns(key), KERNEL), mask=near)
        logits = tl.where(near, logits, -float("inf"))
        top = tl.maximum(highest, tl.max(logits, 1))
        weights = tl.exp2(logits - top[:, None])
        fade = tl.exp2(highest - top)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        highest = top
    total = tl.where(exists, total, 1.0)
    _store(
        _start(out_ptr, out_stride, sample, head), out / total[:, None], token, exists, out_stride[1], dim_v, BLOCK_E
    )
    tl.store(lse_ptr + _plane(sample, head, heads, length) + token, highest + tl.log2(total), mask=exists)


@triton.jit
def _plane(sample, head, heads, length):
    """Where the numbers of one head begin in tensors of one number per token, (samples, heads, tokens)."""
    return (sample * heads + head).to(tl.int64) * length[0] * length[1] * length[2]


@triton.jit
def _backward_queries(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, dbias_ptr, q_stride, k_stride, v_stride,
    out_stride, dq_stride, length, dilation, tiles, heads, scale, unit, dim, dim_v, KERNEL: tl.constexpr,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, BIASED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries, and what its pairs add to the gradient of the bias."""
    sample, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    group, first, members = _boxes(tl.program_id(0) % tiles, length, dilation, TILE)
    query, token, exists = _members(first, group, members, length, dilation, TILE)
    q = _rows(_start(q_ptr, q_stride, sample, head), token, exists, q_stride[1], dim, BLOCK_D)
    grad = _rows(_start(grad_ptr, out_stride, sample, head), token, exists, out_stride[1], dim_v, BLOCK_E)
    lse = tl.load(lse_ptr + _plane(sample, head, heads, length) + token, mask=exists, other=0.0)
    delta = tl.load(delta_ptr + _plane(sample, head, heads, length) + token, mask=exists, other=0.0)
    k_head, v_head = _start(k_ptr, k_stride, sample, head), _start(v_ptr, v_stride, sample, head)
    table = head * (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    start0, count0 = _range(first[0], members[0], KERNEL[0], CAUSAL[0], TILE[0])
    start1, count1 = _range(first[1], members[1], KERNEL[1], CAUSAL[1], TILE[1])
    start2, count2 = _range(first[2], members[2], KERNEL[2], CAUSAL[2], TILE[2])
    dq = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_D], tl.float32)
    for number in range(count0 * count1 * count2):
        box = _step(number, (start0, start1, start2), count1, count2, TILE)
        key, key_token, key_exists = _members(box, group, members, length, dilation, TILE)
        k = _rows(k_head, key_token, key_exists, k_stride[1], dim, BLOCK_D)
        v = _rows(v_head, key_token, key_exists, v_stride[1], dim_v, BLOCK_E)
        near = _inside(_lines(query), _columns(key), members, KERNEL, CAUSAL) & key_exists[None, :] & exists[:, None]
        place = table + _offset(_lines(query), _columns(key), KERNEL)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if BIASED:
            logits += 1.4426950408889634 * tl.load(bias_ptr + place, mask=near, other=0.0)
        weights = tl.where(near, tl.exp2(logits - lse[:, None]), 0.0)
        change = weights * (tl.dot(grad, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if BIASED:
            tl.atomic_add(dbias_ptr + place, change, mask=near)
        dq += tl.dot(change.to(k.dtype), k, input_precision=PRECISION)
    _store(_start(dq_ptr, dq_stride, sample, head), dq * unit, token, exists, dq_stride[1], dim, BLOCK_D)


@triton.jit
def _backward_keys(
    q_ptr, k_ptr, v_ptr, bias_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_stride, k_stride, v_stride,
    out_stride, dk_stride, dv_stride, length, dilation, tiles, heads, scale, unit, dim, dim_v, KERNEL: tl.constexpr,
    CAUSAL: tl.constexpr, TILE: tl.constexpr, BIASED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys, from all queries whose windows touch it."""
    sample, head = tl.program_id(0) // tiles // heads, tl.program_id(0) // tiles % heads
    group, first, members = _boxes(tl.program_id(0) % tiles, length, dilation, TILE)
    key, token, exists = _members(first, group, members, length, dilation, TILE)
    k = _rows(_start(k_ptr, k_stride, sample, head), token, exists, k_stride[1], dim, BLOCK_D)
    v = _rows(_start(v_ptr, v_stride, sample, head), token, exists, v_stride[1], dim_v, BLOCK_E)
    q_head, grad_head = _start(q_ptr, q_stride, sample, head), _start(grad_ptr, out_stride, sample, head)
    plane = _plane(sample, head, heads, length)
    table = bias_ptr + head * (2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)
    start0, count0 = _range_of_queries(first[0], members[0], KERNEL[0], CAUSAL[0], TILE[0])
    start1, count1 = _range_of_queries(first[1], members[1], KERNEL[1], CAUSAL[1], TILE[1])
    start2, count2 = _range_of_queries(first[2], members[2], KERNEL[2], CAUSAL[2], TILE[2])
    dk = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_D], tl.float32)
    dv = tl.zeros([TILE[0] * TILE[1] * TILE[2], BLOCK_E], tl.float32)
    for number in range(count0 * count1 * count2):
        box = _step(number, (start0, start1, start2), count1, count2, TILE)
        query, query_token, query_exists = _members(box, group, members, length, dilation, TILE)
        q = _rows(q_head, query_token, query_exists, q_stride[1], dim, BLOCK_D)
        grad = _rows(grad_head, query_token, query_exists, out_stride[1], dim_v, BLOCK_E)
        lse = tl.load(lse_ptr + plane + query_token, mask=query_exists, other=0.0)
        delta = tl.load(delta_ptr + plane + query_token, mask=query_exists, other=0.0)
        near = _inside(_columns(query), _lines(key), members, KERNEL, CAUSAL) & query_exists[None, :] & exists[:, None]
        logits = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        if BIASED:
            place = table + _offset(_columns(query), _lines(key), KERNEL)
            logits += 1.4426950408889634 * tl.load(place, mask=near, other=0.0)
        weights = tl.where(near, tl.exp2(logits - lse[None, :]), 0.0)
        dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
        change = weights * (tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :])
        dk += tl.dot(change.to(q.dtype), q, input_precision=PRECISION)
    _store(_start(dk_ptr, dk_stride, sample, head), dk * unit, token, exists, dk_stride[1], dim, BLOCK_D)
    _store(_start(dv_ptr, dv_stride, sample, head), dv, token, exists, dv_stride[1], dim_v, BLOCK_E)


class _Fused(torch.autograd.Function):
    """The kernels with their gradients; tensors are (n, x, heads, d) with unit stride along d."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, axes: tuple[Any, ...], scale: float
    ) -> Tensor:  # fmt: skip
        out = torch.empty(*v.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
        table = lse if bias is None else bias.float().contiguous()
        launch = _Launch(axes, q, v, scale, bias is not None)
        given, strides = (q, k, v, table, out, lse), _strides(q, k, v, out)
        with launching_on(q):
            _forward[launch.grid](*given, *strides, *launch.numbers(), **launch.options)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.launch = launch
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        launch, grad = ctx.launch, grad.contiguous()
        delta = (grad.float() * out.float()).sum(-1).transpose(1, 2).contiguous()
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        table = lse if bias is None else bias.float().contiguous()
        dtable = lse if bias is None else torch.zeros_like(table)
        given, inputs = (q, k, v, table, grad, lse, delta), _strides(q, k, v, grad)
        numbers = launch.numbers(unit=True)
        with launching_on(q):
            _backward_queries[launch.grid](*given, dq, dtable, *inputs, *_strides(dq), *numbers, **launch.options)
            _backward_keys[launch.grid](*given, dk, dv, *inputs, *_strides(dk, dv), *numbers, **launch.options)
        return dq, dk, dv, None if bias is None else dtable.to(bias.dtype), None, None


class _Launch:
    """What all three kernels are told about the rule, the heads and the tiles."""

    def __init__(self, axes: tuple[Any, ...], q: Tensor, v: Tensor, scale: float, biased: bool):
        tile = TILES[len(axes)]
        absent = 3 - len(axes)
        row = q.element_size() * max(q.shape[-1], v.shape[-1])
        tile = (tile[0], tile[1], tile[2] // (1 if row <= 256 else 2 if row <= 512 else 4))
        self.length = (1,) * absent + tuple(axis.length for axis in axes)
        self.dilation = (1,) * absent + tuple(axis.dilation for axis in axes)
        parts = zip(self.length, self.dilation, tile, strict=True)
        boxes = (triton.cdiv(triton.cdiv(length, step), side) * step for length, step, side in parts)
        self.tiles, self.heads, self.scale, self.sizes = prod(boxes), q.shape[2], scale, (q.shape[3], v.shape[3])
        self.grid = (self.tiles * q.shape[0] * q.shape[2],)
        exact = q.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32
        self.options: dict[str, Any] = dict(
            KERNEL=(1,) * absent + tuple(axis.kernel for axis in axes),
            CAUSAL=(False,) * absent + tuple(axis.causal for axis in axes),
            TILE=tile, BIASED=biased, BLOCK_D=_block(q.shape[3]), BLOCK_E=_block(v.shape[3]),
            PRECISION="ieee" if exact else "tf32", num_warps=4,
            num_stages=1 if row > 256 else 2,
        )  # fmt: skip

    def numbers(self, unit: bool = False) -> tuple[Any, ...]:
        """The arguments after the strides; backward also wants the scale of plain logits."""
        scales = (self.scale * log2(e), self.scale) if unit else (self.scale * log2(e),)
        return self.length, self.dilation, self.tiles, self.heads, *scales, *self.sizes


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Of samples, tokens and heads."""
    return [tensor.stride()[:3] for tensor in tensors]


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def fused(
    q: Float[Tensor, "n x h d"], k: Float[Tensor, "n x h d"], v: Float[Tensor, "n x h e"], axes: tuple[Any, ...],
    scale: float, bias: Float[Tensor, "h *offsets"] | None,
) -> Float[Tensor, "n x h e"]:  # fmt: skip
    """Neighborhood attention of flattened tokens under the rule `axes`, differentiable in everything.

    With 16-bit inputs the products are of 16 bits and the sums of 32. Gradients of a bias are added up in no fixed
    order. Raises BadInput: other types than float16, bfloat16 and float32, or heads of more than 256 channels.
    """
    if not fits(q, v):
        raise BadInput(
            f'backend="triton" takes float16, bfloat16 and float32, and heads of up to {LARGEST_HEAD} channels, not '
            f'{q.dtype} with {max(q.shape[-1], v.shape[-1])} channels; take backend="block"'
        )
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return _Fused.apply(q, k, v, bias, axes, scale)
