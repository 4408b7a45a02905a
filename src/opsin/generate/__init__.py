"""Generation: noise to an image or a video. The room is also the verb `opsin.generate(...)`."""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from opsin._verbs import make_callable


@runtime_checkable
class Denoiser(Protocol):
    """D(x; sigma, cond): the expected clean image given x = clean + sigma * noise (Karras et al. 2022, eq. 2)."""

    def __call__(
        self, x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"], cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]: ...


@runtime_checkable
class Sampler(Protocol):
    """From unit Gaussian noise to a sample, in `steps` steps."""

    def __call__(
        self, denoiser: Denoiser, noise: Float[Tensor, "n c h w"], steps: int, cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]: ...


@runtime_checkable
class Trick(Protocol):
    """Patches a generator for the time of a `with` block; afterwards it is bit-identical to what it was."""

    def apply(self, generator: nn.Module) -> AbstractContextManager[nn.Module]: ...


make_callable(__name__)
