"""ShuffleNetV2: half of the channels pass a block untouched, and a shuffle lets the halves meet.

Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", arXiv:1807.11164. A block
splits the channels, runs one half through 1x1, depthwise 3x3, 1x1 convolutions, and interleaves the halves; where the
map shrinks, both halves are computed from the whole input. Any strided operator can take the depthwise filter's place;
the variants with `tvconv` are the face networks of Chen et al. 2022 (arXiv:2203.10489) for 96x96 crops. Names of
parameters follow torchvision, so its checkpoints load as they are.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.layers.margin import EmbeddingHead
from opsin.ops.build import build_operator

DEPTHS = (4, 8, 4)
WIDTHS = {
    "x0_5": (24, 48, 96, 192, 1024),
    "x1_0": (24, 116, 232, 464, 1024),
    "x1_5": (24, 176, 352, 704, 1024),
    "x2_0": (24, 244, 488, 976, 2048),
}
"""Channels of the stem, the three stages and the last convolution (table 5 of the paper)."""

FACE = dict(stem_stride=1, embedding=512, image_size=96, num_classes=0)
TVCONV = dict(mixer="tvconv", mixer_options=dict(affinity_channels=4, hidden=64, inner_layers=3))

VARIANTS = {
    **{f"shufflenet_v2_{name}": dict(dims=dims) for name, dims in WIDTHS.items()},
    **{f"shufflenet_v2_{name}_face": dict(dims=WIDTHS[name], **FACE) for name in ("x0_5", "x1_0", "x1_5")},
    **{f"shufflenet_v2_{name}_tvconv": dict(dims=WIDTHS[name], **FACE, **TVCONV) for name in ("x0_5", "x1_0", "x1_5")},
}


def pointwise(dim_in: int, dim: int) -> list[nn.Module]:
    return [nn.Conv2d(dim_in, dim, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]


def shuffle(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Interleaves the two halves of the channels."""
    return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleBlock(nn.Module):
    """Half of the channels through branch2; the others as they are, or at stride 2 through branch1.

    `filters(dim, stride=...)` makes the operator between the 1x1 convolutions.
    """

    def __init__(self, dim_in: int, dim: int, stride: int, filters: Any):
        super().__init__()
        half, split = dim // 2, stride == 1
        self.branch1 = nn.Sequential()
        if not split:
            shrink = filters(dim_in, stride=stride)
            self.branch1 = nn.Sequential(shrink, nn.BatchNorm2d(dim_in), *pointwise(dim_in, half))
        self.branch2 = nn.Sequential(
            *pointwise(half if split else dim_in, half),
            filters(half, stride=stride), nn.BatchNorm2d(half),
            *pointwise(half, half),
        )  # fmt: skip
        self.split = split

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        same, worked = x.chunk(2, dim=1) if self.split else (x, x)
        return shuffle(torch.cat((self.branch1(same), self.branch2(worked)), 1))


class ShuffleNetV2(Backbone):
    """ShuffleNetV2 for classification or embedding; its pyramid has three maps, at 4 to 16 times the stem's stride.

    Args:
        dims: channels of the stem, the stages and the last convolution.
        mixer: an operator that takes dim, kernel_size, stride and bias; mixer_options go to it as well.
        stem_stride: 2, or 1 for small images.
        embedding: dimensions of the face head, 0 for plain pooling.
        image_size: side of the image in pixels; used by operators that are bound to a size only.
    """

    def __init__(
        self, dims: tuple[int, ...] = WIDTHS["x1_0"], mixer: str = "depthwise",
        mixer_options: Mapping[str, Any] | None = None, stem_stride: int = 2, embedding: int = 0,
        image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3,
    ):  # fmt: skip
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        height, width = ((-(-side // stem_stride) + 1) // 2 for side in size)
        self.conv1 = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], 3, stem_stride, 1, bias=False), nn.BatchNorm2d(dims[0]), nn.ReLU()
        )
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for i, depth in enumerate(DEPTHS):
            height, width = (height + 1) // 2, (width + 1) // 2
            options = {"kernel_size": 3, "bias": False, **(mixer_options or {})}
            filters = partial(build_operator, mixer, input_size=(height, width), **options)
            blocks = [ShuffleBlock(dims[i], dims[i + 1], 2, filters)]
            blocks += [ShuffleBlock(dims[i + 1], dims[i + 1], 1, filters) for _ in range(depth - 1)]
            setattr(self, f"stage{i + 2}", nn.Sequential(*blocks))
        self.conv5 = nn.Sequential(*pointwise(dims[3], dims[4]))
        self.embed = EmbeddingHead(dims[4], embedding) if embedding else None
        self.num_classes, self.num_features = num_classes, embedding or dims[4]
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.feature_info = [FeatureInfo(dim, stem_stride * 4 * 2**i) for i, dim in enumerate(dims[1:4])]

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through((self.stage2, self.stage3, self.stage4), self.maxpool(self.conv1(x)))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        x = self.conv5(x)
        return self.fc(x.mean((2, 3)) if self.embed is None else self.embed(x))
