"""Stochastic depth (Huang et al. 2016, arXiv:1603.09382): a residual branch is skipped for a whole sample."""

from collections.abc import Sequence
from itertools import accumulate

from jaxtyping import Float
from torch import Tensor, nn


class DropPath(nn.Module):
    """Zeroes the branch of a sample with probability `rate` and scales the others by 1/(1-rate). Identity in eval."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        if not self.training or self.rate == 0:
            return x
        keep = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates growing linearly from 0 to `rate` over all blocks, split by stage."""
    total = max(sum(depths) - 1, 1)
    starts = accumulate(depths, initial=0)
    return [[rate * (start + i) / total for i in range(depth)] for start, depth in zip(starts, depths)]
