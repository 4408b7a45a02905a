"""Backbones: an image to a feature pyramid, or to logits."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class FeatureInfo(NamedTuple):
    """One level of the pyramid: its channels, and the input pixels per position."""

    channels: int
    stride: int


class Backbone(nn.Module):
    """The contract of the room.

    A member sets `feature_info` (finest level first), `num_features` (channels after pooling) and `num_classes`, and
    implements `features` and `forward_head`. `num_classes=0` makes `forward` return pooled features.
    """

    feature_info: list[FeatureInfo]
    num_features: int
    num_classes: int

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        """The pyramid, one NCHW map per entry of `feature_info`."""
        raise TypeError(f"{type(self).__name__} does not implement features()")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """The last map, in the member's own layout, as `forward_head` takes it."""
        return self.features(x)[-1]

    def forward_head(self, x: Tensor) -> Float[Tensor, "n k"]:
        """Pooling, the last norm, and the classifier if there is one."""
        raise TypeError(f"{type(self).__name__} does not implement forward_head()")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))


def through(stages: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> list[Tensor]:
    """What comes out of every stage, each on what the one before it made."""
    return list(accumulate(stages, lambda x, stage: stage(x), initial=x))[1:]
