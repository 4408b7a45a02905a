"""Neighborhood attention: every token attends to the k nearest tokens per axis, and border tokens to k as well.

Hassani et al. 2024, "Faster Neighborhood Attention", arXiv:2403.04690. Per axis of length X with window k and dilation
d, the tokens i with equal i mod d form a group. Inside its group a token sees the window

    [s, s + k),   s = clamp(i - k // 2, 0, members - k),      or the last k members up to itself on a causal axis,

so windows are pushed inwards at the borders and never padded. Several axes take the product of their windows, and

    out_i = sum_j softmax_j(scale q_i . k_j + bias_(j - i)) v_j,   j in window(i).

Four ways to compute it, with equal results:

- dense: all pairs under a mask. The definition; O(n^2).
- gather: every query copies its k^n keys. O(n k^n) time and memory; nothing is computed in vain.
- block: queries go in tiles, and each tile attends to the one patch of keys that covers its windows, under a mask (the
  fused kernel's tiling). Tiles are batched into one attention call. O(n) memory: the scratch space stays near
  `SCRATCH_BYTES` whatever the window, because tiles are taken in portions, which backward computes anew.
- triton: the same tiling as fused kernels (`neighborhood_triton`), which keep logits on the chip. CUDA only.

Tensors are heads-last: (batch, X, ..., heads, head_dim) with one to three spatial axes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from opsin.errors import BadInput, UnknownName
from opsin.ops.kernels import kernel_wanted, require_kernel

Backend = Literal["auto", "triton", "block", "gather", "dense"]
TILE_SIDE = {1: 64, 2: 8, 3: 4}  # queries per tile and axis, by the number of axes
MOST_DENSE = 1024  # tokens whose pairs may all be computed
SCRATCH_BYTES = 8 * 2**20  # keys, values and masks that are copied at a time


class Axis(NamedTuple):
    """The rule of one axis."""

    length: int
    kernel: int
    dilation: int = 1
    causal: bool = False

    def members(self, group: np.ndarray) -> np.ndarray:
        """How many tokens the dilation groups have; those beyond the remainder have one fewer."""
        return (self.length - group + self.dilation - 1) // self.dilation

    def windows(self) -> tuple[np.ndarray, np.ndarray]:
        """First member and the one after the last, inside its group, of the window of every token."""
        token = np.arange(self.length)
        place = token // self.dilation
        if self.causal:
            return np.maximum(place - self.kernel + 1, 0), place + 1
        start = np.clip(place - self.kernel // 2, 0, self.members(token % self.dilation) - self.kernel)
        return start, start + self.kernel


class Cut(NamedTuple):
    """One axis cut into t tiles of q queries, each with the c consecutive group members that cover their windows.

    A tile that sticks out of its group repeats the group's last member.
    """

    query: Int[np.ndarray, "t q"]  # token of each query
    key: Int[np.ndarray, "t c"]  # token of each candidate key
    inside: Bool[np.ndarray, "t q c"]  # whether the key is in the query's window
    offset: Int[np.ndarray, "t q c"]  # key's place minus query's, in members
    tile: Int[np.ndarray, " x"]  # where each token is as a query
    slot: Int[np.ndarray, " x"]


class Tiles(NamedTuple):
    """Some tiles over all axes; tokens are those of the flattened space."""

    query: Int[np.ndarray, "t q"]
    key: Int[np.ndarray, "t c"]
    inside: Bool[np.ndarray, "t q c"]
    offset: list[Int[np.ndarray, "t _q _c"]]  # per axis


@lru_cache(maxsize=256)
def cut(axis: Axis, side: int) -> Cut:
    """Tiles of nearly equal sides, about `side` long, group by group."""
    longest = -(-axis.length // axis.dilation)
    width = -(-longest // max(1, round(longest / side)))
    count = -(-longest // width)
    reach = min(width + axis.kernel - 1, longest)
    group = np.arange(axis.dilation).repeat(count)[:, None]
    members = axis.members(group)
    place = np.minimum(np.tile(np.arange(count), axis.dilation)[:, None] * width + np.arange(width), members - 1)
    query = place * axis.dilation + group
    start, stop = (bound[query] for bound in axis.windows())
    candidate = np.clip(start[:, :1], 0, np.maximum(members - reach, 0)) + np.arange(reach)
    token = np.arange(axis.length)
    return Cut(
        query=query,
        key=np.minimum(candidate, members - 1) * axis.dilation + group,
        inside=(candidate[:, None] >= start[..., None]) & (candidate[:, None] < stop[..., None]),
        offset=candidate[:, None] - place[..., None],
        tile=token % axis.dilation * count + token // axis.dilation // width,
        slot=token // axis.dilation % width,
    )


@lru_cache(maxsize=32)
def tiles_of(axes: tuple[Axis, ...], first: int, last: int) -> Tiles:
    """The tiles from number `first` up to `last`, counted with the last axis fastest."""
    cuts = [cut(axis, TILE_SIDE[len(axes)]) for axis in axes]
    chosen = np.unravel_index(np.arange(first, last), [len(table.query) for table in cuts])
    query, key, inside, offset = zip(*([table[part][i] for part in range(4)] for table, i in zip(cuts, chosen)))
    sizes = [axis.length for axis in axes]
    return Tiles(
        query=_flat([array[:, :, None] for array in query], sizes)[..., 0],
        key=_flat([array[:, None] for array in key], sizes)[:, 0],
        inside=_outer(inside, np.logical_and),
        offset=list(offset),
    )


def neighborhood_attention(
    q: Float[Tensor, "n *space heads d"], k: Float[Tensor, "n *space heads d"], v: Float[Tensor, "n *space heads e"],
    kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1, causal: bool | Sequence[bool] = False,
    scale: float | None = None, bias: Float[Tensor, "heads *offsets"] | None = None, backend: Backend = "auto",
) -> Float[Tensor, "n *space heads e"]:  # fmt: skip
    """Neighborhood attention over one, two or three axes.

    kernel_size, dilation, causal: one value, or one per axis. scale: head_dim^-0.5 by default.
    bias: added to the logits by relative position, 2k - 1 entries per axis with the offset 0 in the middle.
    backend: "auto" is "triton" on CUDA, else "block", or "dense" on maps of which a tile needs three quarters; on the
        meta device "gather", so that counts of operations are those of the definition.
    Raises BadInput: shapes that do not fit, kernel * dilation beyond an axis, or "triton" where it cannot run. Raises
    UnknownName (backend).
    """
    axes = rule(q.shape[1:-2], kernel_size, dilation, causal)
    if not q.shape == k.shape == v.shape[:-1] + q.shape[-1:]:
        raise BadInput(f"q, k and v differ in shape: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    expected = (q.shape[-2], *(2 * axis.kernel - 1 for axis in axes))
    if bias is not None and bias.shape != expected:
        raise BadInput(f"the bias has the shape {tuple(bias.shape)}; this window wants {expected}")
    if backend == "auto":
        plain = "dense" if bias is None and small(axes) else "block"
        backend = "gather" if q.is_meta else "triton" if kernel_wanted(q) and _kernels().fits(q, v) else plain
    if backend not in BACKENDS:
        raise UnknownName("backend", backend, BACKENDS)
    flat = [t.flatten(1, -3) for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[backend](*flat, axes, scale, bias).unflatten(1, q.shape[1:-2])


def rule(
    space: Sequence[int], kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
) -> tuple[Axis, ...]:  # fmt: skip
    """The rule of every axis. Raises BadInput where a window does not fit."""
    if not 1 <= len(space) <= 3:
        raise BadInput(f"neighborhood attention takes 1 to 3 spatial axes, but the tensor has {len(space)}")
    options = []
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation), ("causal", causal)):
        value = (value,) * len(space) if isinstance(value, int) else tuple(value)
        if len(value) != len(space):
            raise BadInput(f"{name}={value} names {len(value)} axes, but the tensor has {len(space)}")
        options.append(value)
    axes = tuple(Axis(*values) for values in zip(space, *options, strict=True))
    for axis in axes:
        if axis.kernel < 1 or axis.dilation < 1 or axis.kernel * axis.dilation > axis.length:
            raise BadInput(
                f"a window of {axis.kernel} tokens with dilation {axis.dilation} does not fit an axis of {axis.length} "
                "tokens; kernel and dilation are at least 1, and their product at most the axis"
            )
    return axes


@lru_cache(maxsize=256)
def small(axes: tuple[Axis, ...]) -> bool:
    """Whether copying the keys of every tile is more work than all pairs, and all pairs are few."""
    tokens = prod(axis.length for axis in axes)
    keys = prod(cut(axis, TILE_SIDE[len(axes)]).key.shape[1] for axis in axes)
    return 4 * keys >= 3 * tokens and tokens <= MOST_DENSE


@lru_cache(maxsize=32)
def pairs(axes: tuple[Axis, ...]) -> tuple[Bool[np.ndarray, "x x"], list[Int[np.ndarray, "_x _x"]]]:
    """Whether the second token is in the window of the first, and per axis its place minus the first one's."""
    inside, offset = [], []
    for axis in axes:
        token = np.arange(axis.length)
        start, stop = (bound[:, None] for bound in axis.windows())
        place, same = token // axis.dilation, token[:, None] % axis.dilation == token % axis.dilation
        inside.append(same & (place >= start) & (place < stop))
        offset.append(place - place[:, None])
    return _outer(inside, np.logical_and), offset


def dense(
    q: Float[Tensor, "n x h d"], k: Float[Tensor, "n x h d"], v: Float[Tensor, "n x h e"], axes: tuple[Axis, ...],
    scale: float, bias: Tensor | None,
) -> Float[Tensor, "n x h e"]:  # fmt: skip
    """All pairs of tokens under the mask of the rule: the definition, word by word."""
    inside, offset = pairs(axes) if q.shape[1] <= MOST_DENSE else pairs.__wrapped__(axes)  # keeps no large ones
    mask = torch.as_tensor(inside, device=q.device)
    if bias is not None:
        mask = _looked_up(bias, offset).masked_fill(~mask, -torch.inf)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def gather(
    q: Float[Tensor, "n x h d"], k: Float[Tensor, "n x h d"], v: Float[Tensor, "n x h e"], axes: tuple[Axis, ...],
    scale: float, bias: Tensor | None,
) -> Float[Tensor, "n x h e"]:  # fmt: skip
    """A copy of its k^n keys and values for every query, then one small product per query."""
    index, inside, offset = [], [], []
    for axis in axes:
        token = np.arange(axis.length)[:, None]
        start, stop = (bound[:, None] for bound in axis.windows())
        place = start + np.arange(axis.kernel)
        inside.append(place < stop)
        place = np.minimum(place, stop - 1)
        index.append(place * axis.dilation + token % axis.dilation)
        offset.append(place - token // axis.dilation)
    keys = torch.as_tensor(_flat(index, [axis.length for axis in axes]), device=q.device)
    q, k, v = (rearrange(t, "n x h d -> n h x d") for t in (q, k, v))
    near_k, near_v = (t.index_select(2, keys.flatten()).unflatten(2, keys.shape) for t in (k, v))
    logits = (q.unsqueeze(-2) * scale) @ near_k.transpose(-1, -2)
    if bias is not None:
        logits = logits + _looked_up(bias, offset).unsqueeze(-2)
    outside = torch.as_tensor(~_outer(inside, np.logical_and), device=q.device)
    weights = logits.masked_fill(outside.unsqueeze(-2), -torch.inf).softmax(-1)
    return rearrange(weights @ near_v, "n h x 1 d -> n x h d")


def block(
    q: Float[Tensor, "n x h d"], k: Float[Tensor, "n x h d"], v: Float[Tensor, "n x h e"], axes: tuple[Axis, ...],
    scale: float, bias: Tensor | None,
) -> Float[Tensor, "n x h e"]:  # fmt: skip
    """Tiles of queries, each against the patch of keys that covers its windows.

    A token's row holds all samples and heads that share a mask: everything, or with a bias the samples of one head.
    """
    cuts = [cut(axis, TILE_SIDE[len(axes)]) for axis in axes]
    heads = q.shape[2] if bias is not None else 1
    rows = [rearrange(t, "n x (g h) d -> g x (n h) d", g=heads) for t in (q, k, v)]
    queries, keys = (prod(table[i].shape[1] for table in cuts) for i in (0, 1))
    counts = [len(table.query) for table in cuts]
    portion = total = prod(counts)
    if not torch.compiler.is_compiling():
        cost = heads * keys * (sum(t.shape[2:].numel() for t in rows[1:]) + queries) * q.element_size()
        portion = min(total, max(1, SCRATCH_BYTES // cost))
    again = total > portion and torch.is_grad_enabled()
    parts = []
    for first in range(0, total, portion):
        arguments = (*rows, bias, tiles_of(axes, first, min(first + portion, total)), scale)
        parts.append(checkpoint(_attend, *arguments, use_reentrant=False) if again else _attend(*arguments))
    tile = _flat([table.tile[:, None] for table in cuts], counts)
    slot = _flat([table.slot[:, None] for table in cuts], [table.query.shape[1] for table in cuts])
    place = torch.as_tensor((tile * queries + slot)[:, 0], device=q.device)
    out = torch.cat(parts, 1).index_select(1, place)
    return rearrange(out, "g x (n h) d -> n x (g h) d", n=q.shape[0])


def _attend(
    q: Float[Tensor, "g x m d"], k: Float[Tensor, "g x m d"], v: Float[Tensor, "g x m e"],
    bias: Float[Tensor, "g *offsets"] | None, tiles: Tiles, scale: float,
) -> Float[Tensor, "g tq m e"]:  # fmt: skip
    """Attention of some tiles' queries, tile after tile."""
    queries, keys, mask = (torch.as_tensor(array, device=q.device) for array in tiles[:3])
    if bias is not None:
        mask = _spread(bias, tiles.offset).masked_fill(~mask, -torch.inf).flatten(0, 1)
    picked = (
        rearrange(rows.index_select(1, index.flatten()), "g (t l) m d -> (g t) m l d", t=len(index))
        for rows, index in ((q, queries), (k, keys), (v, keys))
    )
    out = F.scaled_dot_product_attention(*picked, attn_mask=mask.unsqueeze(1), scale=scale)
    return rearrange(out, "(g t) m q d -> g (t q) m d", g=len(q))


def _outer(parts: Sequence[np.ndarray], join: Callable[..., np.ndarray]) -> np.ndarray:
    """Joins per-axis arrays (..., q_a, k_a) into one over all axes (..., prod q_a, prod k_a), the last axis fastest."""

    def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        joined = join(a[..., :, None, :, None], b[..., None, :, None, :])
        return joined.reshape(*joined.shape[:-4], a.shape[-2] * b.shape[-2], a.shape[-1] * b.shape[-1])

    return reduce(pair, parts)


def _flat(parts: Sequence[np.ndarray], sizes: Sequence[int]) -> Int[np.ndarray, "... q k"]:
    """Indices per axis (..., q_a, k_a) to indices into the flattened space of these sizes."""
    strides = [prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return _outer([part * stride for part, stride in zip(parts, strides)], np.add)


def _looked_up(bias: Float[Tensor, "h *offsets"], offsets: list[np.ndarray]) -> Float[Tensor, "h q k"]:
    """The bias of every pair, read from the table; pairs outside the windows get any entry."""
    places = [np.clip(o + size // 2, 0, size - 1) for o, size in zip(offsets, bias.shape[1:])]
    return bias.flatten(1)[:, torch.as_tensor(_flat(places, bias.shape[1:]), device=bias.device)]


def _spread(bias: Float[Tensor, "h *offsets"], offsets: list[np.ndarray]) -> Float[Tensor, "h t q k"]:
    """The same for tiles, as one product with a one-hot matrix per axis: both directions are matrix products."""
    heads, *sizes = bias.shape
    out = bias.reshape(1, heads, 1, 1, -1)
    for offset, size in zip(offsets, sizes):
        choice = np.clip(offset + size // 2, 0, size - 1)[..., None] == np.arange(size)
        choice = torch.as_tensor(choice, device=bias.device).to(bias.dtype)
        out = torch.einsum("thQKro,tqkr->thQqKko", out.unflatten(-1, (size, -1)).expand(len(offset), *[-1] * 5), choice)
        out = out.flatten(4, 5).flatten(2, 3)
    return out.squeeze(-1).transpose(0, 1)


def fused(
    q: Float[Tensor, "n x h d"], k: Float[Tensor, "n x h d"], v: Float[Tensor, "n x h e"], axes: tuple[Axis, ...],
    scale: float, bias: Tensor | None,
) -> Float[Tensor, "n x h e"]:  # fmt: skip
    """Tiles as in `block`, in Triton kernels. Raises BadInput where they cannot run."""
    require_kernel(q)
    return _kernels().fused(q, k, v, axes, scale, bias)


def _kernels() -> ModuleType:
    return import_module("opsin.ops.attention.neighborhood_triton")


def flex_mask(axes: tuple[Axis, ...], device: torch.device | str = "cpu") -> Callable[..., Tensor]:
    """The rule as a `mask_mod` for `torch.nn.attention.flex_attention.create_block_mask` over flattened tokens."""
    bounds = [[torch.as_tensor(bound, device=device) for bound in axis.windows()] for axis in axes]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        inside = torch.ones_like(q, dtype=torch.bool)
        for axis, (start, stop) in zip(reversed(axes), reversed(bounds)):
            i, j = q % axis.length, kv % axis.length
            place = j // axis.dilation
            inside = inside & (i % axis.dilation == j % axis.dilation) & (place >= start[i]) & (place < stop[i])
            q, kv = q // axis.length, kv // axis.length
        return inside

    return mask_mod


BACKENDS = {"triton": fused, "block": block, "gather": gather, "dense": dense}
