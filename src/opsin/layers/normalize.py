"""Input normalisation as a layer, so that images outside a model are always in [0, 1]."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Normalize(nn.Module):
    """(x - mean) / std per channel. Channels that never vary are only centred.

    Args:
        mean, std: one number per channel, in the units of the images; empty for the identity.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float] = (), std: Sequence[float] = ()):
        super().__init__()
        shift, scale = torch.tensor(mean or (0.0,)), torch.tensor(std or (1.0,))
        self.register_buffer("mean", shift.float().view(-1, 1, 1))
        self.register_buffer("std", torch.where(scale > 1e-6, scale, torch.ones_like(scale)).float().view(-1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (x - self.mean) / self.std

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"
