"""Poincare ResNet: a residual network that is hyperbolic from the pixels to the logits.

van Spengler et al. 2023, "Poincare ResNet", arXiv:2303.14027. Convolutions, batch norms, shortcuts and the classifier
compute in the Poincare ball; between them maps hold tangent vectors at its origin, on which ReLU and pooling act:

    y = relu( log0( exp0(branch(x)) (+) exp0(shortcut(x)) ) ),   branch = conv, BN, relu, conv, BN

with Mobius addition (+) along the channels. Three things make it train: filters that start as half the identity, so
that vectors keep their length; batch norm around a midpoint in closed form; and backward passes written by hand. The
geometry is in `opsin.layers.poincare`, the convolution is the operator `poincare_conv`.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.layers.poincare import Curved, OnBall, mobius_residual
from opsin.layers.poincare_layers import Init, PoincareBatchNorm2d, PoincareLinear
from opsin.ops.conv.poincare_conv import PoincareConv2d

VARIANTS = {
    "poincare_resnet20_8_16_32": dict(depths=(3, 3, 3), dims=(8, 16, 32)),
    "poincare_resnet32_8_16_32": dict(depths=(5, 5, 5), dims=(8, 16, 32)),
    "poincare_resnet20_4_8_16": dict(depths=(3, 3, 3), dims=(4, 8, 16)),
}


class PoincareBlock(OnBall):
    """Two 3x3 convolutions and a Mobius shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(
        self, dim_in: int, dim: int, stride: int, curvature: Curved, norm: type[PoincareBatchNorm2d], init: Init
    ):
        super().__init__(curvature)
        self.conv1 = PoincareConv2d(dim_in, dim, 3, stride, curvature, init)
        self.bn1 = norm(dim, curvature)
        self.relu1 = nn.ReLU()
        self.conv2 = PoincareConv2d(dim, dim, 3, 1, curvature, init)
        self.bn2 = norm(dim, curvature)
        same = stride == 1 and dim_in == dim
        self.downsample = nn.Identity() if same else PoincareConv2d(dim_in, dim, 1, stride, curvature, init)
        self.relu2 = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(mobius_residual(y, self.downsample(x), self.c))


class PoincareResNet(Backbone):
    """Tangent maps at strides 1, 2, 4; logits are tangent too.

    Args:
        depths: blocks per group, (n - 2) / 6 each in a network of n layers. dims: channels per group.
        curvature: c of the ball of curvature -c, or a LearnedCurvature, which all layers share.
        norm: PoincareBatchNorm2d (midpoint) or FrechetBatchNorm2d, the slow baseline.
        init: "identity", or "gaussian", which collapses to the origin with depth.
    """

    def __init__(
        self, depths: Sequence[int] = (3, 3, 3), dims: Sequence[int] = (8, 16, 32), num_classes: int = 10,
        in_chans: int = 3, curvature: Curved = 0.1, norm: type[PoincareBatchNorm2d] = PoincareBatchNorm2d,
        init: Init = "identity",
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, 2**i) for i, dim in enumerate(dims)]
        self.conv = PoincareConv2d(in_chans, dims[0], 3, 1, curvature, init)
        self.bn = norm(dims[0], curvature)
        self.relu = nn.ReLU()
        self.groups, dim_in = nn.ModuleList(), dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            shapes = [(dim_in, 2 if i else 1), *[(dim, 1)] * (depth - 1)]
            blocks = [PoincareBlock(width, dim, stride, curvature, norm, init) for width, stride in shapes]
            self.groups.append(nn.Sequential(*blocks))
            dim_in = dim
        self.fc = PoincareLinear(dims[-1], num_classes, curvature, init) if num_classes else nn.Identity()

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through(self.groups, self.relu(self.bn(self.conv(x))))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.fc(x.mean((2, 3)))
