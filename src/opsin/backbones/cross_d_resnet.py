"""ResNet whose convolutions are all Cross-D convolutions, the stem and the shortcuts included (arXiv:2411.02441).

It is trained on images; `opsin.ops.conv.cross_d_conv.to_3d` then makes the network for volumes of it, with its kernels.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from opsin.backbones.resnet import BasicBlock, Bottleneck, ResNet
from opsin.ops.conv.cross_d_conv import CrossDConv2d, convert, remap

__all__ = ["CrossDResNet", "remap"]


class CrossDResNet(ResNet):
    """A ResNet for (n, c, h, w), and as `to_3d` returns it for (n, c, d, h, w).

    Args: block, depths, dims, stem: as of `ResNet`; shortcuts are projections. layer: the class of the convolutions.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck] = BasicBlock, depths: Sequence[int] = (2, 2, 2, 2),
        dims: Sequence[int] = (64, 128, 256, 512), stem: Literal["imagenet", "cifar"] = "imagenet",
        num_classes: int = 1000, in_chans: int = 3, layer: type[CrossDConv2d] = CrossDConv2d,
    ):  # fmt: skip
        super().__init__(block, depths, dims, stem, num_classes=num_classes, in_chans=in_chans)
        for name, part in tuple(self.named_children()):
            setattr(self, name, convert(part, layer))

    def forward_head(self, x: Float[Tensor, "n c *size"]) -> Float[Tensor, "n k"]:
        return self.fc(x.flatten(2).mean(2))


VARIANTS = {
    "crossd_resnet18_in1k": {},
    "crossd_resnet18_rin": dict(num_classes=165),
}
