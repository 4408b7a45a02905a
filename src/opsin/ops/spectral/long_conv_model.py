"""The long convolution paper's network for sequences: arXiv:2302.06646, section 5.1 and appendix C."""

from typing import Literal

from opsin.ops.spectral.long_conv import Init, LongConv, Smoothing
from opsin.ops.spectral.sequence import SequenceClassifier

VARIANTS = {
    "long_conv_lra_image": dict(
        inputs=1, classes=10, dim=512, lam=0.003, dropout=0.1, tie_dropout=True, kernel_dropout=0.2
    ),
    "long_conv_pathfinder": dict(
        inputs=1, classes=2, dim=256, lam=0.001, dropout=0.0, kernel_dropout=0.3, bidirectional=True, prenorm=True,
        norm="batch",
    ),
    "long_conv_standalone_cifar": dict(
        inputs=3, classes=10, dim=256, lam=0.001, dropout=0.1, kernel_dropout=0.2, bidirectional=True
    ),
}  # fmt: skip


class LongConvModel(SequenceClassifier):
    """(B, L, inputs) -> (B, classes). Options of the layer as in LongConv, of the network as in SequenceClassifier."""

    def __init__(
        self, inputs: int = 1, classes: int = 10, dim: int = 512, depth: int = 6, length: int = 1024,
        channels: int = 2, bidirectional: bool = False, lam: float = 0.003, kernel_dropout: float = 0.2,
        init: Init = "random", smoothing: Smoothing = "none", window: int = 7, dropout: float = 0.1,
        tie_dropout: bool = False, prenorm: bool = False, norm: Literal["layer", "batch"] = "layer",
        pool: Literal["mean", "last"] = "mean",
    ):  # fmt: skip
        layers = (
            LongConv(
                dim, length, channels, bidirectional, dropout, tie_dropout, lam, kernel_dropout, init, smoothing, window
            )
            for _ in range(depth)
        )
        super().__init__(layers, inputs, classes, dim, dropout, prenorm, norm, pool)
