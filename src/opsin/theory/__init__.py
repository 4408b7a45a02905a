"""Infinite-width kernels, scattering, sample-complexity tasks."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Kernel(Protocol):
    """A positive semi-definite kernel: rows of x against rows of y."""

    def __call__(self, x: Float[Tensor, "n d"], y: Float[Tensor, "m d"] | None = None) -> Float[Tensor, "n m"]: ...
