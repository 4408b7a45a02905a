"""Attacks, defences, consistency. Images are in [0, 1]: normalisation belongs inside the model."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@runtime_checkable
class Attack(Protocol):
    """The contract of the room: stays inside its threat model, which `allowed` checks per image."""

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]: ...

    def allowed(self, images: Float[Tensor, "n c h w"], attacked: Float[Tensor, "n c h w"]) -> Bool[Tensor, " n"]: ...


@runtime_checkable
class Defence(Protocol):
    """Changes how a model computes for the time of a `with` block."""

    def apply(self, model: nn.Module) -> AbstractContextManager[nn.Module]: ...
