"""MobileNetV2: inverted residuals with linear bottlenecks, and any strided operator in place of the depthwise filter.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", arXiv:1801.04381. A block widens t times,
filters each channel, and projects back without an activation, for the narrow ends carry the information:

    y = BN(W_2 act(BN(DW(act(BN(W_1 x)))))),   act = ReLU6,   plus x where stride and width allow it

The variants with `tvconv` are the face networks of Chen et al. 2022 (arXiv:2203.10489): 96x96 crops, a stem of stride
1, and a 512-dimensional embedding. Names of parameters follow timm, so its checkpoints load as they are.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.layers.margin import EmbeddingHead
from opsin.ops.build import build_operator

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, blocks and stride of the first block, per stage (table 2 of the paper)."""
PYRAMID = (0, 1, 2, 4, 6)  # the last stage of each resolution

FACE = dict(stem_stride=1, head_dim=512, embedding=512, image_size=96, num_classes=0)
TVCONV = dict(mixer="tvconv", mixer_options=dict(affinity_channels=4, hidden=64, inner_layers=3))
FACE_WIDTHS = {"x0_1": 0.1, "x0_2": 0.2, "x0_3": 0.3, "x0_5": 0.5, "x1_0": 1.0}

VARIANTS = {
    "mobilenetv2_050": dict(width=0.5),
    "mobilenetv2_100": {},
    "mobilenetv2_140": dict(width=1.4),
    **{f"mobilenet_v2_{name}_face": dict(width=width, **FACE) for name, width in FACE_WIDTHS.items()},
    **{f"mobilenet_v2_{name}_tvconv": dict(width=width, **FACE, **TVCONV) for name, width in FACE_WIDTHS.items()},
}


def round_channels(channels: float) -> int:
    """The nearest multiple of 8, but not less than 90 % of `channels`, and at least 8."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class DepthwiseSeparable(nn.Module):
    """Filter, then project: the block without expansion."""

    def __init__(self, dim_in: int, dim: int, filters: nn.Module, residual: bool):
        super().__init__()
        self.conv_dw, self.bn1 = filters, nn.BatchNorm2d(dim_in)
        self.conv_pw, self.bn2 = nn.Conv2d(dim_in, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.act, self.residual = nn.ReLU6(), residual

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        y = self.bn2(self.conv_pw(self.act(self.bn1(self.conv_dw(x)))))
        return x + y if self.residual else y


class InvertedResidual(nn.Module):
    """Expand, filter, project."""

    def __init__(self, dim_in: int, dim: int, hidden: int, filters: nn.Module, residual: bool):
        super().__init__()
        self.conv_pw, self.bn1 = nn.Conv2d(dim_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv_dw, self.bn2 = filters, nn.BatchNorm2d(hidden)
        self.conv_pwl, self.bn3 = nn.Conv2d(hidden, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.act, self.residual = nn.ReLU6(), residual

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        y = self.act(self.bn2(self.conv_dw(self.act(self.bn1(self.conv_pw(x))))))
        y = self.bn3(self.conv_pwl(y))
        return x + y if self.residual else y


def make_stages(
    width: float, dim: int, size: tuple[int, int], mixer: str, options: Mapping[str, Any]
) -> list[nn.Sequential]:
    """The stages of the table for maps of `dim` channels and this size."""
    stages = []
    for expansion, channels, depth, first_stride in STAGES:
        out, blocks = round_channels(channels * width), []
        for stride in (first_stride, *[1] * (depth - 1)):
            size, hidden, residual = reduced(size, stride), dim * expansion, stride == 1 and dim == out
            filters = build_operator(mixer, hidden, size, stride=stride, **options)
            if expansion == 1:
                blocks.append(DepthwiseSeparable(dim, out, filters, residual))
            else:
                blocks.append(InvertedResidual(dim, out, hidden, filters, residual))
            dim = out
        stages.append(nn.Sequential(*blocks))
    return stages


def reduced(size: tuple[int, int], stride: int) -> tuple[int, int]:
    """The size after a padded 3x3 filter of this stride."""
    return (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1


class MobileNetV2(Backbone):
    """MobileNetV2 for classification or embedding; its pyramid has five maps, at 1 to 16 times the stem's stride.

    Args:
        width: multiplies all channels; head_dim, the last layer's, only grows.
        mixer: an operator that takes dim, kernel_size, stride and bias; mixer_options go to it as well.
        stem_stride: 2, or 1 for small images.
        embedding: dimensions of the face head, 0 for plain pooling.
        image_size: side of the image in pixels; used by operators that are bound to a size only.
    """

    def __init__(
        self, width: float = 1.0, mixer: str = "depthwise", mixer_options: Mapping[str, Any] | None = None,
        stem_stride: int = 2, head_dim: int = 1280, embedding: int = 0, image_size: int | tuple[int, int] = 224,
        num_classes: int = 1000, in_chans: int = 3, drop: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        options = {"kernel_size": 3, "bias": False, **(mixer_options or {})}
        dim, last, head_dim = (round_channels(c * w) for c, w in ((32, width), (320, width), (head_dim, max(1, width))))
        self.conv_stem, self.bn1 = nn.Conv2d(in_chans, dim, 3, stem_stride, 1, bias=False), nn.BatchNorm2d(dim)
        self.blocks = nn.Sequential(*make_stages(width, dim, reduced(size, stem_stride), mixer, options))
        self.conv_head, self.bn2 = nn.Conv2d(last, head_dim, 1, bias=False), nn.BatchNorm2d(head_dim)
        self.act, self.drop = nn.ReLU6(), nn.Dropout(drop)
        self.embed = EmbeddingHead(head_dim, embedding) if embedding else None
        self.num_classes, self.num_features = num_classes, embedding or head_dim
        self.classifier = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        channels = (round_channels(STAGES[i][1] * width) for i in PYRAMID)
        self.feature_info = [FeatureInfo(c, stem_stride * 2**i) for i, c in enumerate(channels)]
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        maps = through(self.blocks, self.act(self.bn1(self.conv_stem(x))))
        return [maps[i] for i in PYRAMID]

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        x = self.act(self.bn2(self.conv_head(x)))
        x = x.mean((2, 3)) if self.embed is None else self.embed(x)
        return self.classifier(self.drop(x))
