"""Objectives that need no labels. The room is also the verb `opsin.pretrain(...)`."""

from jaxtyping import Float
from torch import Tensor, nn

from opsin._verbs import make_callable


class Pretrainer(nn.Module):
    """The contract of the room: `Pretrainer(backbone)`.

    `forward(images)` returns losses by name; `.backbone` afterwards is an ordinary backbone. The card lists the
    backbones that it works with under `[facts] backbones`.
    """

    backbone: nn.Module

    def forward(self, images: Float[Tensor, "n c h w"]) -> dict[str, Tensor]:
        raise TypeError(f"{type(self).__name__} does not implement forward()")


make_callable(__name__)
