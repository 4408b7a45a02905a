"""Choosing tokens: every sample of a batch its own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def taken(
    tokens: Float[Tensor, "n x c"], index: Int[Tensor, "n *t"], further: Int[Tensor, "n *t"] | None = None
) -> Float[Tensor, "n *t c"]:  # fmt: skip
    """Every sample's tokens in an order of its own, as whole rows of memory: those at `index + further`, broadcast."""
    count = tokens.shape[1]
    start = torch.arange(0, tokens.shape[0] * count, count, device=tokens.device)
    index = index + start.view(-1, *(1,) * (index.ndim - 1))
    index = index if further is None else index + further
    return tokens.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
