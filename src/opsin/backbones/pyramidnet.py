"""PyramidNet: a ResNet whose width grows a little in every block instead of doubling at every stage.

Han et al. 2016, "Deep Pyramidal Residual Networks", arXiv:1610.02915, for small images. A baseline. Block k of N has
round(16 + alpha k / N) channels (eq. 3), times 4 with bottlenecks, and no activation after the sum:

    y = shortcut(x) + BN(1x1(relu(BN(3x3(relu(BN(1x1(BN(x)))))))))

Shortcuts have no parameters: average pooling where the map shrinks, zeros for new channels. Names of parameters follow
the repository of CutMix, which publishes weights.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.backbones import Backbone, FeatureInfo, through

VARIANTS = {"pyramidnet200_a240": dict(depth=200, alpha=240), "pyramidnet110_a64": dict(depth=110, alpha=64)}


class Bottleneck(nn.Module):
    """BN, 1x1, BN, relu, 3x3, BN, relu, 1x1, BN; `dim` channels inside and 4 * dim outside."""

    def __init__(self, dim_in: int, dim: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(dim_in)
        self.conv1 = nn.Conv2d(dim_in, dim, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(dim)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(dim, dim, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(dim)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(4 * dim)
        self.downsample = nn.AvgPool2d(2, 2, ceil_mode=True) if stride == 2 else nn.Identity()
        self.extra = 4 * dim - dim_in

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        y = self.relu1(self.bn2(self.conv1(self.bn1(x))))
        y = self.relu2(self.bn3(self.conv2(y)))
        return self.bn4(self.conv3(y)) + F.pad(self.downsample(x), (0, 0, 0, 0, 0, self.extra))


class PyramidNet(Backbone):
    """PyramidNet with bottlenecks for 32-pixel images; maps at strides 1, 2, 4.

    Args: depth in layers, 9n + 2; alpha, the width added in all.
    """

    def __init__(self, depth: int = 200, alpha: float = 240, num_classes: int = 100, in_chans: int = 3):
        super().__init__()
        blocks = (depth - 2) // 9
        widths = [round(16 + alpha * (k + 1) / (3 * blocks)) for k in range(3 * blocks)]
        self.num_classes, self.num_features = num_classes, 4 * widths[-1]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.feature_info = []
        dims_in = [16, *(4 * width for width in widths)]
        for i in range(3):
            rows = range(i * blocks, (i + 1) * blocks)
            stage = [Bottleneck(dims_in[k], widths[k], 2 if i and k == rows[0] else 1) for k in rows]
            self.add_module(f"layer{i + 1}", nn.Sequential(*stage))
            self.feature_info.append(FeatureInfo(4 * widths[rows[-1]], 2**i))
        self.bn_final = nn.BatchNorm2d(self.num_features)
        self.relu_final = nn.ReLU()
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through((self.layer1, self.layer2, self.layer3), self.bn1(self.conv1(x)))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.fc(self.relu_final(self.bn_final(x)).mean((2, 3)))
