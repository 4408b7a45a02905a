"""Changes to training itself: a Lightning callback, a batch transform, or both."""

from typing import Any

from jaxtyping import Float
from lightning import Callback
from torch import Tensor


class Recipe(Callback):
    """The contract of the room.

    `transform` runs on every training batch, on its device, before the loss. `fit` seeds torch's generator from
    (seed, step) before each step, so a recipe draws from it freely and still resumes bit for bit. Class targets may
    come back as indices (n,) or as probabilities (n, k). Whatever a recipe keeps between steps goes through Lightning's
    `state_dict` / `load_state_dict`.
    """

    def transform(self, images: Float[Tensor, "n c h w"], targets: Any, num_classes: int) -> tuple[Tensor, Any]:
        """A batch to the batch that is trained on. The default leaves it as it is."""
        return images, targets
