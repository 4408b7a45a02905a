"""Why the network said so. The room is also the verb `opsin.explain(...)`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from opsin._verbs import make_callable


@dataclass
class Explanation:
    """A map of relevance over one image.

    map: at the image's resolution; signed where the method has evidence against the class as well.
    image: values in [0, 1]. target: the class that is explained. method: the explainer's key.
    """

    map: Float[Tensor, "h w"]
    image: Float[Tensor, "c h w"]
    target: int
    method: str

    def save(self, path: str | Path) -> Path:
        """Writes image, map and overlay side by side as a PNG."""
        from opsin.explain.picture import save_explanation

        return save_explanation(self, Path(path))


@runtime_checkable
class Explainer(Protocol):
    """The contract of the room.

    image: one image (C, H, W), as the model takes it. target: a class, or None for the predicted one.
    """

    def __call__(self, model: nn.Module, image: Float[Tensor, "c h w"], target: int | None = None) -> Explanation: ...


make_callable(__name__)
