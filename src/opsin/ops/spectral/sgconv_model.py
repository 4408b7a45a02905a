"""A network for sequences out of structured global convolutions: S4's, with its layer replaced (arXiv:2210.09298)."""

from typing import Literal

from opsin.ops.spectral.sequence import SequenceClassifier
from opsin.ops.spectral.sgconv import Init, Mode, SGConv, Stretch

VARIANTS = {"sgconv_lra": dict(inputs=1, classes=10, dim=512, bidirectional=True, tie_dropout=True)}


class SGConvModel(SequenceClassifier):
    """(B, L, inputs) -> (B, classes). Options of the layer as in SGConv, of the network as in SequenceClassifier."""

    def __init__(
        self, inputs: int = 1, classes: int = 10, dim: int = 512, depth: int = 6, length: int = 1024,
        channels: int = 1, bidirectional: bool = False, kernel_dim: int = 32, decay_min: float = 2.0,
        decay_max: float = 2.0, mode: Mode = "cat", init: Init = "random", stretch: Stretch = "linear",
        dropout: float = 0.1, tie_dropout: bool = False, prenorm: bool = False,
        norm: Literal["layer", "batch"] = "layer", pool: Literal["mean", "last"] = "mean",
    ):  # fmt: skip
        layers = (
            SGConv(
                dim, length, channels, bidirectional, dropout, tie_dropout, kernel_dim, decay_min, decay_max, mode,
                init, stretch,
            )
            for _ in range(depth)
        )  # fmt: skip
        super().__init__(layers, inputs, classes, dim, dropout, prenorm, norm, pool)
