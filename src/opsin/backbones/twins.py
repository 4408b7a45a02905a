"""Twins-SVT: attention in windows, and attention to a few keys of the whole map, take turns.

Chu et al. 2021, "Twins: Revisiting the Design of Spatial Attention in Vision Transformers", arXiv:2104.13840. A
baseline. Windows do not move; what they miss comes from the next block, whose keys a strided convolution reduces to a
small map (section 3.2). Positions enter through a depthwise convolution after the first block of a stage (PEG):

    x = x + attention(LN x);   x = x + MLP(LN x);   attention = window (even blocks), sub-sampled (odd blocks)

Names of parameters follow timm's `twins`.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo
from opsin.layers import DropPath, Mlp, PatchEmbed, drop_path_rates, init_weights_
from opsin.ops.attention.subsampled_attention import SubsampledAttention
from opsin.ops.attention.window_attention import WindowAttention

VARIANTS = {
    "twins_svt_small": dict(dims=(64, 128, 256, 512), depths=(2, 2, 10, 4), num_heads=(2, 4, 8, 16)),
    "twins_svt_base": dict(dims=(96, 192, 384, 768), depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "twins_svt_large": dict(dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}


class PosConv(nn.Module):
    """Positions from a 3x3 depthwise convolution, whose border says where tokens are: (N, H, W, C) -> the same."""

    def __init__(self, dim: int, border: str = "zeros"):
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, padding_mode=border))

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        return x + self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x); `stride` is the side of a window, or of what becomes one key."""

    def __init__(self, dim: int, attn: nn.Module, stride: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.stride = stride
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(mlp_ratio * dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        x = x + self.drop_path(self.attn(self.norm1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Twins(Backbone):
    """A pyramid of strides 4, 8, 16, ... for classification, any input size.

    Args:
        dims, depths, num_heads, sr_ratios: per stage; sr_ratios are the sides of what becomes one key.
        window_size: tokens per side of a window. patch_size: pixels of the first stage's patches.
    """

    border = "zeros"  # what the convolutions of positions see beyond the map

    def __init__(
        self, dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (2, 2, 10, 4),
        num_heads: Sequence[int] = (2, 4, 8, 16), sr_ratios: Sequence[int] = (8, 4, 2, 1), window_size: int = 7,
        patch_size: int = 4, mlp_ratio: float = 4.0, num_classes: int = 1000, in_chans: int = 3,
        drop_path: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, patch_size * 2**i) for i, dim in enumerate(dims)]
        chans = (in_chans, *dims)
        self.patch_embeds = nn.ModuleList(
            PatchEmbed(chans[i], dim, patch_size if i == 0 else 2, norm=nn.LayerNorm) for i, dim in enumerate(dims)
        )
        self.blocks, self.pos_block = nn.ModuleList(), nn.ModuleList(PosConv(dim, self.border) for dim in dims)
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            stage = nn.ModuleList()
            for j, rate in enumerate(rates):
                stride = window_size if j % 2 == 0 else sr_ratios[i]
                attn = (WindowAttention if j % 2 == 0 else SubsampledAttention)(dims[i], num_heads[i], stride)
                stage.append(Block(dims[i], attn, stride, mlp_ratio, rate))
            self.blocks.append(stage)
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        init_weights_(self)

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        maps = []
        for number in range(len(self.blocks)):
            x = self.stage(number, x).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def stage(self, number: int, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n h2 w2 c2"]:
        """Patches, then blocks, with positions after the first."""
        x = self.patch_embeds[number](x)
        for i, block in enumerate(self.blocks[number]):
            x = block(x)
            x = self.pos_block[number](x) if i == 0 else x
        return x

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.norm(x.permute(0, 2, 3, 1)).mean((1, 2)))
