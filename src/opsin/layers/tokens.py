"""Choosing tokens: every sample of a batch its own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def taken(tokens: Float[Tensor, "n x c"], index: Int[Tensor, "n t"]) -> Float[Tensor, "n t c"]:
    """Every sample's tokens in an order of its own, as whole rows of memory."""
    start = torch.arange(tokens.shape[0], device=tokens.device)[:, None] * tokens.shape[1]
    return tokens.flatten(0, 1).index_select(0, (index + start).flatten()).unflatten(0, index.shape)
