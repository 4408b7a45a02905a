"""Neighborhood attention as an operator: projections to query, key and value, local attention, projection back.

Hassani et al. 2024, "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock
Level", arXiv:2403.04690; as a mixer first in "Neighborhood Attention Transformer" (2023, arXiv:2204.07143). The rule
and its four implementations are in `opsin.ops.attention.neighborhood`. Names of parameters follow NATTEN.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName
from opsin.ops.attention.heads import heads_of
from opsin.ops.attention.neighborhood import BACKENDS, Backend, neighborhood_attention


class NeighborhoodAttention(nn.Module):
    """(N, C, X, ...) -> the same, over one to three spatial axes.

    Where the map is smaller than kernel * dilation, first the dilation and then the kernel shrink to what fits.

    Args:
        num_heads: by default of about 32 channels (see `heads_of`).
        kernel_size, dilation, causal: one value, or one per axis.
        axes: number of spatial axes; 2 is a picture.
        rel_pos_bias: learn a bias per head and relative position, 2k - 1 per axis.
    Raises BadInput: heads that do not divide the channels, or a kernel or dilation below 1. UnknownName: the backend.
    """

    def __init__(
        self, dim: int, num_heads: int | None = None, kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1, causal: bool | Sequence[bool] = False, axes: int = 2,
        rel_pos_bias: bool = False, qkv_bias: bool = True, backend: Backend = "auto",
    ):  # fmt: skip
        super().__init__()
        if backend not in ("auto", *BACKENDS):
            raise UnknownName("backend", backend, ("auto", *BACKENDS))
        self.num_heads = heads_of(dim, num_heads)
        self.kernel_size = _per_axis("kernel_size", kernel_size, axes)
        self.dilation = _per_axis("dilation", dilation, axes)
        self.causal, self.backend = causal, backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.rpb = None
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(self.num_heads, *(2 * k - 1 for k in self.kernel_size)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.qkv, self.proj):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
        return self._mix(x, self.backend)

    def reference(self, x: Float[Tensor, "n c *space"]) -> Float[Tensor, "n c *space"]:
        """The same by dense attention under a mask."""
        return self._mix(x, "dense")

    def _mix(self, x: Float[Tensor, "n c *space"], backend: Backend) -> Float[Tensor, "n c *space"]:
        if x.ndim - 2 != len(self.kernel_size):
            raise BadInput(f"this operator is for {len(self.kernel_size)} spatial axes, but the input has {x.ndim - 2}")
        kernel, dilation = self.window(x.shape[2:])
        q, k, v = self.qkv(x.movedim(1, -1)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        bias = self.rpb
        if bias is not None:
            for axis, (full, used) in enumerate(zip(self.kernel_size, kernel), start=1):
                bias = bias.narrow(axis, full - used, 2 * used - 1)
        out = neighborhood_attention(q, k, v, kernel, dilation, self.causal, bias=bias, backend=backend)
        return self.proj(out.flatten(-2)).movedim(-1, 1)

    def window(self, space: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Kernel and dilation as they are used on a map of this size."""
        dilation = tuple(max(1, min(d, size // k)) for size, k, d in zip(space, self.kernel_size, self.dilation))
        return tuple(min(k, size) for size, k in zip(space, self.kernel_size)), dilation

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


def _per_axis(name: str, value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise BadInput(f"{name}={values} names {len(values)} axes, but the operator has {axes}")
    if any(v < 1 for v in values):
        raise BadInput(f"{name}={value} is too small; take at least 1 on every axis")
    return values
