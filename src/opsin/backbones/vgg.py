"""VGG: nothing but 3x3 convolutions and pooling, deep.

Simonyan & Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556.
A baseline. Names of parameters follow timm (`features.N`, `pre_logits.fc1`, `head.fc`); the two wide linear layers are
a 7x7 and a 1x1 convolution, so that any image size works.
"""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput

VARIANTS = {
    "vgg11": dict(depths=(1, 1, 2, 2, 2)),
    "vgg13": dict(depths=(2, 2, 2, 2, 2)),
    "vgg16": dict(depths=(2, 2, 3, 3, 3)),
    "vgg19": dict(depths=(2, 2, 4, 4, 4)),
    "vgg16_bn": dict(depths=(2, 2, 3, 3, 3), batch_norm=True),
}
KERNEL = 7  # of the first wide layer, on the 7x7 map of a 224x224 image


class ConvMlp(nn.Module):
    """The two wide layers as convolutions; a map smaller than their kernel is first pooled up to it."""

    def __init__(self, dim: int, hidden: int, drop: float):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, KERNEL)
        self.act1 = nn.ReLU()
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Conv2d(hidden, hidden, 1)
        self.act2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d _h _w"]:
        if min(x.shape[-2:]) < KERNEL:
            x = F.adaptive_avg_pool2d(x, [max(KERNEL, side) for side in x.shape[-2:]])
        return self.act2(self.fc2(self.drop(self.act1(self.fc1(x)))))


class Head(nn.Module):
    """Mean over positions, dropout, the classifier."""

    def __init__(self, dim: int, num_classes: int, drop: float):
        super().__init__()
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.fc(self.drop(x.mean((2, 3))))


class VGG(Backbone):
    """VGG for classification, or its pyramid: the maps after each of the five poolings.

    Args:
        depths and dims: convolutions and channels per stage. drop: dropout around the wide layers.
        hidden: width of the two wide layers; 0 leaves them out, as dense tasks do.
        output_stride: of the last map. Poolings beyond it are 3x3 with stride 1; the convolutions after them dilate.
        overlapping_pool: poolings are 3x3 with padding 1 and keep the odd rest, as in DeepLab's networks.
    Raises BadInput for an output stride other than 2, 4, 8, 16 or 32.
    """

    def __init__(
        self, depths: Sequence[int] = (2, 2, 3, 3, 3), dims: Sequence[int] = (64, 128, 256, 512, 512),
        num_classes: int = 1000, in_chans: int = 3, batch_norm: bool = False, hidden: int = 4096, drop: float = 0.5,
        output_stride: int = 32, overlapping_pool: bool = False,
    ):  # fmt: skip
        super().__init__()
        if output_stride not in (2, 4, 8, 16, 32):
            raise BadInput(f"output_stride={output_stride} cannot be reached; it must be 2, 4, 8, 16 or 32")
        self.num_classes, self.num_features = num_classes, hidden or dims[-1]
        layers: list[nn.Module] = []
        self.ends, self.feature_info = [], []  # ends: where each stage stops in `layers`
        stride, dilation, dim_in = 1, 1, in_chans
        for depth, dim in zip(depths, dims, strict=True):
            for _ in range(depth):
                layers.append(nn.Conv2d(dim_in, dim, 3, padding=dilation, dilation=dilation))
                layers += [nn.BatchNorm2d(dim), nn.ReLU()] if batch_norm else [nn.ReLU()]
                dim_in = dim
            if stride < output_stride:
                stride *= 2
                layers.append(nn.MaxPool2d(3, 2, 1, ceil_mode=True) if overlapping_pool else nn.MaxPool2d(2))
            else:
                dilation *= 2
                layers.append(nn.MaxPool2d(3, 1, 1))
            self.ends.append(len(layers))
            self.feature_info.append(FeatureInfo(dim, stride))
        self.layers = nn.Sequential(*layers)
        self.pre_logits = ConvMlp(dim_in, hidden, drop) if hidden else nn.Identity()
        self.head = Head(self.num_features, num_classes, drop)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        maps = []
        for start, end in pairwise((0, *self.ends)):
            for layer in self.layers[start:end]:
                x = layer(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.pre_logits(x))


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to ours: only the stack of convolutions is called otherwise (`features` is a method here)."""
    return {f"layers.{name.removeprefix('features.')}" if name.startswith("features.") else name: value
            for name, value in state.items()}  # fmt: skip
