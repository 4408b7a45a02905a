"""Restoration: an image to a better image. The room is also the verb `opsin.restore(...)`."""

from jaxtyping import Float
from torch import Tensor, nn

from opsin._verbs import make_callable


class Restorer(nn.Module):
    """The contract of the room: values in [0, 1], any height and width.

    task: what it repairs ("sr", "denoise", "dehaze", ...).
    scale: output size over input size.
    receptive_field: how many input pixels to each side one output value depends on, or None where it is the whole image
        or not known; the overlap of tiles follows from it.
    channels: the numbers of channels that it takes; it returns as many.
    """

    task: str = "sr"
    scale: int = 1
    receptive_field: int | None = None
    channels: tuple[int, ...] = (1, 3)

    def forward(self, image: Float[Tensor, "n c h w"], **conditions: Tensor) -> Float[Tensor, "n c h2 w2"]:
        raise TypeError(f"{type(self).__name__} does not implement forward()")


make_callable(__name__)
