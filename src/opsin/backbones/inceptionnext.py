"""InceptionNeXt: ConvNeXt whose 7x7 depthwise kernel becomes a small square, two bands and an identity, for throughput.

Yu et al. 2023, "InceptionNeXt: When Inception Meets ConvNeXt", arXiv:2303.16900. The block is MetaNeXt (eq. 2):

    y = x + gamma * MLP(BN(mixer(x))),   mixer = inception depthwise convolution (section 3.2)

Names of parameters follow timm, so its checkpoints load as they are.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn, ones

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.layers import DropPath, drop_path_rates, init_weights_
from opsin.ops.conv.inception_depthwise import InceptionDepthwiseConv

VARIANTS = {
    "inception_next_atto": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), band_size=9, branch_ratio=0.25),
    "inception_next_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "inception_next_small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "inception_next_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
}
MLP_RATIOS = (4, 4, 4, 3)


class ConvMlp(nn.Module):
    """Two 1x1 convolutions around a GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, dim, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.fc2(self.act(self.fc1(x)))


class MetaNeXtBlock(nn.Module):
    """x + gamma * MLP(BN(mixer(x))): the norm follows the mixer, and there is one residual (eq. 2)."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: int, drop_path: float, layer_scale: float = 1e-6):
        super().__init__()
        self.token_mixer = mixer
        self.norm = nn.BatchNorm2d(dim)
        self.mlp = ConvMlp(dim, mlp_ratio * dim)
        self.gamma = nn.Parameter(layer_scale * ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.mlp(self.norm(self.token_mixer(x)))
        return x + self.drop_path(y * self.gamma[:, None, None])


class Stage(nn.Module):
    """BN and a 2x2 convolution of stride 2 (not in the first stage), then blocks."""

    def __init__(self, dim_in: int, dim: int, blocks: list[MetaNeXtBlock], downsample: bool):
        super().__init__()
        down = nn.Sequential(nn.BatchNorm2d(dim_in), nn.Conv2d(dim_in, dim, 2, 2))
        self.downsample = down if downsample else nn.Identity()
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return self.blocks(self.downsample(x))


class MlpHead(nn.Module):
    """Linear, GELU, LayerNorm, dropout, Linear on pooled features."""

    def __init__(self, dim: int, num_classes: int, ratio: int = 3, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(ratio * dim, eps=1e-6)
        self.drop = nn.Dropout(drop)
        self.fc2 = nn.Linear(ratio * dim, num_classes)

    def forward(self, x: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        return self.fc2(self.drop(self.norm(self.act(self.fc1(x)))))


class InceptionNeXt(Backbone):
    """InceptionNeXt for classification, or its pyramid at strides 4, 8, 16, 32.

    Args: depths and dims per stage; band_size and branch_ratio of the mixer; drop_path, the last block's rate.
    """

    def __init__(
        self, depths: Sequence[int] = (3, 3, 9, 3), dims: Sequence[int] = (96, 192, 384, 768), band_size: int = 11,
        branch_ratio: float = 0.125, num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        drop: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, 4 * 2**i) for i, dim in enumerate(dims)]
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, 4), nn.BatchNorm2d(dims[0]))
        rates = drop_path_rates(drop_path, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [
                MetaNeXtBlock(
                    dim, InceptionDepthwiseConv(dim, band_size=band_size, branch_ratio=branch_ratio),
                    MLP_RATIOS[i], rate,
                )
                for rate in rates[i]
            ]  # fmt: skip
            stages.append(Stage(dims[max(i - 1, 0)], dim, blocks, downsample=i > 0))
        self.stages = nn.Sequential(*stages)
        self.head = MlpHead(dims[-1], num_classes, drop=drop) if num_classes else nn.Identity()
        init_weights_(self)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through(self.stages, self.stem(x))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(x.mean((2, 3)))
