"""ConvNeXt: a ResNet brought up to date step by step until it is a pure ConvNet with a transformer's proportions.

Liu et al. 2022, "A ConvNet for the 2020s", arXiv:2201.03545. The block (fig. 4) mixes space and channels apart, with
one norm and one activation:

    y = x + gamma * MLP(LN(depthwise 7x7(x))),   MLP = Linear C -> 4C, GELU, Linear 4C -> C

Stages are joined by LN and a 2x2 convolution of stride 2. The isotropic variant is a single stage of 16x16 patches
without the stem's norm. The way from ResNet-50 is in `convnext_ladder`. Names of parameters follow timm's; `remap`
takes the original checkpoints and torchvision's.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn, ones

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.layers import DropPath, LayerNorm2d, Mlp, drop_path_rates, init_weights_

VARIANTS = {
    "convnext_tiny": dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    "convnext_small": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "convnext_base": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "convnext_large": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "convnext_xlarge": dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),
    "convnext_iso_small": dict(depths=(18,), dims=(384,), patch_size=16, stem_norm=False, layer_scale=None),
    "convnext_iso_base": dict(depths=(18,), dims=(768,), patch_size=16, stem_norm=False, layer_scale=None),
    "convnext_iso_large": dict(depths=(36,), dims=(1024,), patch_size=16, stem_norm=False, layer_scale=None),
}


class Block(nn.Module):
    """x + gamma * MLP(LN(depthwise(x))); the MLP works on channels last, which costs nothing in that memory format."""

    def __init__(self, dim: int, kernel_size: int, layer_scale: float | None, drop_path: float):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(layer_scale * ones(dim))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        y = y if self.gamma is None else y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class Stage(nn.Module):
    """LN and a 2x2 convolution of stride 2 (not in the first stage), then blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[Block]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return self.blocks(self.downsample(x))


class ConvNeXt(Backbone):
    """ConvNeXt for classification, or its pyramid at strides p, 2p, 4p, 8p, where p is `patch_size`.

    Args:
        depths, dims: per stage. patch_size: of the stem, in pixels; stem_norm: whether LN follows it.
        layer_scale: start of gamma, None for no gamma; drop_path: the last block's rate.
        head_scale: factor on the classifier's first weights, 0.001 for fine-tuning.
    """

    def __init__(
        self, depths: Sequence[int] = (3, 3, 9, 3), dims: Sequence[int] = (96, 192, 384, 768), patch_size: int = 4,
        kernel_size: int = 7, num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        layer_scale: float | None = 1e-6, stem_norm: bool = True, head_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, patch_size * 2**i) for i, dim in enumerate(dims)]
        norm = LayerNorm2d(dims[0]) if stem_norm else nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], patch_size, patch_size), norm)
        self.stages = nn.Sequential()
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            down = (
                nn.Sequential(LayerNorm2d(dims[i - 1]), nn.Conv2d(dims[i - 1], dims[i], 2, 2)) if i else nn.Identity()
            )
            self.stages.append(Stage(down, [Block(dims[i], kernel_size, layer_scale, rate) for rate in rates]))
        fc = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self.head = nn.Sequential(OrderedDict(norm=nn.LayerNorm(dims[-1], eps=1e-6), fc=fc))
        init_weights_(self)
        if num_classes:
            fc.weight.data.mul_(head_scale)

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through(self.stages, self.stem(x))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(x.mean((2, 3)))


ORIGINAL = (
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"^stem\.(weight|bias)$", r"stem.0.\1"),  # isotropic
    (r"^blocks\.(\d+)\.", r"stages.0.blocks.\1."),
    (r"\.dwconv\.", ".conv_dw."),
    (r"\.pwconv([12])\.", r".mlp.fc\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
)
TORCHVISION = (
    (r"^features\.0\.", "stem."),
    (r"^features\.([246])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.block\.0\.", ".conv_dw."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".mlp.fc1."),
    (r"\.block\.5\.", ".mlp.fc2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "head.norm."),
    (r"^classifier\.2\.", "head.fc."),
)


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of the original checkpoints or torchvision's to ours; timm's pass unchanged."""
    if any(name.startswith("features.") for name in state):
        state = {n: t.flatten() if n.endswith("layer_scale") else t for n, t in state.items()}
        return _rename(state, TORCHVISION)
    if any(".pwconv1." in name for name in state):
        return _rename(state, ORIGINAL)
    return state


def _rename(state: dict[str, Tensor], rules: Sequence[tuple]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed
