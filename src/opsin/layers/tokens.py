"""Choosing tokens: every sample of a batch its own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def taken(
    tokens: Float[Tensor, "n x *c"], index: Int[Tensor, "n *t"], further: Int[Tensor, "n *t"] | None = None
) -> Float[Tensor, "n ..."]:  # fmt: skip
    """Every sample's tokens in an order of its own, as whole rows of memory: those at `index + further`, broadcast."""
    where = addresses(index, tokens.shape[1])
    return at(tokens, where if further is None else where + further)


def addresses(index: Int[Tensor, "n *t"], count: int) -> Int[Tensor, "n *t"]:
    """Where these tokens are when the samples, of `count` tokens each, lie one behind another."""
    start = torch.arange(0, index.shape[0] * count, count, device=index.device)
    return index + start.view(-1, *(1,) * (index.ndim - 1))


def at(tokens: Float[Tensor, "n x *c"], where: Int[Tensor, "n *t"]) -> Float[Tensor, "n ..."]:
    """The tokens at these addresses."""
    return tokens.flatten(0, 1).index_select(0, where.flatten()).unflatten(0, where.shape)
