"""NAT and DiNAT: a hierarchical transformer whose attention is local, every other layer dilated in DiNAT.

Hassani et al. 2023, "Neighborhood Attention Transformer", arXiv:2204.07143; Hassani and Shi 2022, "Dilated Neighborhood
Attention Transformer", arXiv:2209.15001. Overlapping 3x3 convolutions of stride 2 make the tokens and halve the map
between the four levels; a block is

    x = x + gamma_1 * NA(LN(x));   x = x + gamma_2 * MLP(LN(x))

with 7x7 windows and a relative position bias. Dilations are the largest that fit a 224-pixel image. Names of parameters
follow the official checkpoints of SHI-Labs.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn, ones

from opsin.backbones import Backbone, FeatureInfo
from opsin.errors import BadInput
from opsin.layers import DropPath, Mlp, drop_path_rates
from opsin.ops.attention.heads import heads_of
from opsin.ops.attention.neighborhood_attention import NeighborhoodAttention


def _dilated(depths: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """Every second layer of a level dilated."""
    return [[d if i % 2 else 1 for i in range(depth)] for depth, d in zip(depths, dilations)]


MINI = dict(dim=64, depths=(3, 4, 6, 5), mlp_ratio=3)
TINY = dict(dim=64, depths=(3, 4, 18, 5), mlp_ratio=3)
SMALL = dict(dim=96, depths=(3, 4, 18, 5), mlp_ratio=2)
BASE = dict(dim=128, depths=(3, 4, 18, 5), mlp_ratio=2, layer_scale=1e-5)
LARGE = dict(dim=192, depths=(3, 4, 18, 5), mlp_ratio=2)
AT_224, AT_384 = (8, 4, 2, 1), (13, 6, 3, 1)

VARIANTS = {
    "nat_mini": MINI,
    "nat_tiny": TINY,
    "nat_small": SMALL | dict(layer_scale=1e-5),
    "nat_base": BASE,
    "dinat_mini": MINI | dict(dilations=_dilated(MINI["depths"], AT_224)),
    "dinat_tiny": TINY | dict(dilations=_dilated(TINY["depths"], AT_224)),
    "dinat_small": SMALL | dict(dilations=_dilated(SMALL["depths"], AT_224)),
    "dinat_base": BASE | dict(dilations=_dilated(BASE["depths"], AT_224)),
    "dinat_large": LARGE | dict(dilations=_dilated(LARGE["depths"], AT_224)),
    "dinat_large_384": LARGE | dict(dilations=_dilated(LARGE["depths"], AT_384)),
    "dinat_large_384_11x11": LARGE | dict(dilations=_dilated(LARGE["depths"], AT_224), kernel_size=11),
}


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2 and a layer norm: tokens at a quarter of the resolution."""

    def __init__(self, in_chans: int, dim: int):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h2 w2 d"]:
        return self.norm(self.proj(x).movedim(1, -1))


class ConvDownsampler(nn.Module):
    """A 3x3 convolution of stride 2 that doubles the channels, and a layer norm."""

    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, 2, 1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h2 w2 c2"]:
        return self.norm(self.reduction(x.movedim(-1, 1)).movedim(1, -1))


class NATBlock(nn.Module):
    """Pre-norm neighborhood attention and MLP, channels last; `layer_scale=None` leaves the gammas out."""

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int, dilation: int, mlp_ratio: float, drop_path: float,
        layer_scale: float | None,
    ):  # fmt: skip
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(dim, num_heads, kernel_size, dilation, rel_pos_bias=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = 1.0
        if layer_scale is not None:
            self.gamma1, self.gamma2 = (nn.Parameter(layer_scale * ones(dim)) for _ in range(2))

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        attended = self.attn(self.norm1(x).movedim(-1, 1)).movedim(1, -1)
        x = x + self.drop_path(self.gamma1 * attended)
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class Level(nn.Module):
    """Blocks at one resolution, and the way to the next."""

    def __init__(self, blocks: list[NATBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.downsample = downsample


class NAT(Backbone):
    """NAT for classification, or its pyramid at strides 4, 8, 16, 32. Any image of at least 32 pixels.

    Args: dim of the first level, doubled by each next; dilations per level and block, 1 where left out; drop_path, the
    last block's rate. Heads have 32 channels, or about as many where these do not divide a level's (see `heads_of`).
    Raises BadInput: dim below 32, or a window that is empty.
    """

    def __init__(
        self, dim: int = 64, depths: Sequence[int] = (3, 4, 6, 5), mlp_ratio: float = 3.0, kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None, layer_scale: float | None = None, num_classes: int = 1000,
        in_chans: int = 3, drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if dim < 32:
            raise BadInput(f"dim={dim} is less than one head, which has 32 channels; take at least 32")
        dims = [dim * 2**i for i in range(len(depths))]
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(d, 4 * 2**i) for i, d in enumerate(dims)]
        self.patch_embed = ConvTokenizer(in_chans, dim)
        self.levels = nn.ModuleList()
        for d, level_dilations, rates in zip(dims, dilations, drop_path_rates(drop_path, depths), strict=True):
            blocks = [
                NATBlock(d, heads_of(d), kernel_size, dilation, mlp_ratio, rate, layer_scale)
                for dilation, rate in zip(level_dilations, rates, strict=True)
            ]
            self.levels.append(Level(blocks, ConvDownsampler(d) if d < dims[-1] else None))
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self._init_linear()

    def _init_linear(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        x = self.patch_embed(x)
        maps = []
        for level in self.levels:
            x = level.blocks(x)
            maps.append(x.movedim(-1, 1))
            x = x if level.downsample is None else level.downsample(x)
        return maps

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.norm(x.movedim(1, -1)).mean((1, 2)))
