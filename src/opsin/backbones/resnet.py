"""ResNet: blocks learn what to add to their input.

He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. A baseline:

    y = relu(shortcut(x) + branch(x)),   branch = two 3x3 convolutions, or 1x1, 3x3, 1x1

The default is version 1.5 (a block's stride in its 3x3 convolution). Names of parameters follow torchvision and timm.
"""

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.errors import BadInput


class PadShortcut(nn.Module):
    """The free shortcut (option A, section 3.3): every second pixel, and zeros for the new channels."""

    def __init__(self, dim_in: int, dim: int, stride: int):
        super().__init__()
        self.extra, self.stride = dim - dim_in, stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(
        self, dim_in: int, dim: int, stride: int, dilation: int, stride_in_1x1: bool, downsample: nn.Module | None
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim, 3, stride, dilation, dilation, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(y)) + shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the stride is in the 3x3 one (v1.5) or in the first (v1, `stride_in_1x1`)."""

    expansion = 4

    def __init__(
        self, dim_in: int, dim: int, stride: int, dilation: int, stride_in_1x1: bool, downsample: nn.Module | None
    ):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(dim_in, dim, 1, first, bias=False)
        self.bn1 = nn.BatchNorm2d(dim)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim, dim, 3, second, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * dim)
        self.downsample = downsample
        self.relu3 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        return self.relu3(self.bn3(self.conv3(y)) + shortcut)


class ResNet(Backbone):
    """ResNet for classification, or its pyramid, one map per stage.

    Args:
        block: BasicBlock or Bottleneck; depths and dims (before the block's expansion) per stage.
        stem: "imagenet" for 7x7 convolution and max-pooling (stride 4), "cifar" for one 3x3 convolution (stride 1).
        shortcut: where shapes change, "projection" (1x1 convolution and BN) or "pad" (no parameters).
        stride_in_1x1: the original bottleneck (v1) instead of v1.5.
        output_stride: of the last map. Stages beyond it keep their stride at 1 and dilate all their 3x3 convolutions
            instead (the rule of DeepLab: the first block of a stage too).
        ceil_pool: max-pooling keeps the odd rest, as in Caffe.
    Raises BadInput where the strides do not reach `output_stride`.
    """

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck] = Bottleneck, depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 256, 512), stem: Literal["imagenet", "cifar"] = "imagenet",
        shortcut: Literal["projection", "pad"] = "projection", num_classes: int = 1000, in_chans: int = 3,
        stride_in_1x1: bool = False, output_stride: int = 32, ceil_pool: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1] * block.expansion
        large = stem == "imagenet"
        self.conv1 = nn.Conv2d(in_chans, dims[0], 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(dims[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=ceil_pool) if large else nn.Identity()
        reached = 4 if large else 1
        if output_stride not in [reached * 2**i for i in range(6)]:
            raise BadInput(f"output_stride={output_stride} cannot be reached; it must be {reached} times a power of 2")
        dilation, dim_in = 1, dims[0]
        self.feature_info, self.num_stages = [], len(depths)
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            stride = 1 if i == 0 else 2
            if stride * reached > output_stride:
                dilation, stride = dilation * stride, 1
            reached *= stride
            blocks = []
            for n in range(depth):
                step = stride if n == 0 else 1
                down = _shortcut(shortcut, dim_in, dim * block.expansion, step)
                blocks.append(block(dim_in, dim, step, dilation, stride_in_1x1, down))
                dim_in = dim * block.expansion
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            self.feature_info.append(FeatureInfo(dim_in, reached))
        self.fc = nn.Linear(dim_in, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        stages = (getattr(self, f"layer{i + 1}") for i in range(self.num_stages))
        return through(stages, self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.fc(x.mean((2, 3)))


def _shortcut(kind: str, dim_in: int, dim: int, stride: int) -> nn.Module | None:
    if dim_in == dim and stride == 1:
        return None
    if kind == "pad":
        return PadShortcut(dim_in, dim, stride)
    return nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride, bias=False), nn.BatchNorm2d(dim))


CIFAR = dict(block=BasicBlock, dims=(16, 32, 64), stem="cifar", shortcut="pad", num_classes=10)
VARIANTS = {
    "resnet18": dict(block=BasicBlock, depths=(2, 2, 2, 2)),
    "resnet34": dict(block=BasicBlock, depths=(3, 4, 6, 3)),
    "resnet50": dict(depths=(3, 4, 6, 3)),
    "resnet101": dict(depths=(3, 4, 23, 3)),
    "resnet152": dict(depths=(3, 8, 36, 3)),
    "resnet20_cifar": CIFAR | dict(depths=(3, 3, 3)),
    "resnet56_cifar": CIFAR | dict(depths=(9, 9, 9)),
}
