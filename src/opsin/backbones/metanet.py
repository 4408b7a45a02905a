"""MetaNet: the workbench. Four stages that take any mixer operator by name, with everything else fixed.

The block is the MetaFormer abstraction (Yu et al. 2022, "MetaFormer Is Actually What You Need for Vision",
arXiv:2111.11418, eq. 1-2), in which the mixer is the only part left open:

    x = x + mixer(norm(x));   x = x + MLP(norm(x))
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo
from opsin.catalog import card_of, create, operators
from opsin.errors import BadInput
from opsin.layers import DropPath, LayerNorm2d, drop_path_rates, init_weights_
from opsin.ops.build import build_operator

VARIANTS = {
    "metanet_n": dict(depths=(1, 1, 2, 1), dims=(16, 32, 64, 96), stem_stride=1),
    "metanet_xt": dict(depths=(1, 1, 3, 1), dims=(32, 64, 128, 192), stem_stride=2),
    "metanet_t": dict(depths=(2, 2, 6, 2), dims=(64, 128, 320, 512)),
    "metanet_s": dict(depths=(4, 4, 12, 4), dims=(64, 128, 320, 512)),
}


def build_mixer(name: str, dim: int, size: tuple[int, int], options: Mapping[str, Any]) -> nn.Module:
    """An operator by name, told its resolution if its weights depend on it. Raises BadInput where it is no mixer."""
    if not card_of(name).mixer:
        raise BadInput(f"'{name}' is not a mixer; the mixers are {', '.join(operators('mixer'))}")
    return build_operator(name, dim, size, **options)


def build_norm(name: str | None, dim: int) -> nn.Module:
    """The norm of a block: an operator by name, or LayerNorm2d. Raises BadInput where it is no norm."""
    if name is None:
        return LayerNorm2d(dim)
    if not card_of(name).role("norm"):
        known = ", ".join(operators("norm"))
        raise BadInput(f"'{name}' is not a norm; the norms are {known}, and without a name it is layer norm")
    return create(name, dim=dim)


class Block(nn.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: int, drop_path: float, norm: str | None = None):
        super().__init__()
        self.norm1 = build_norm(norm, dim)
        self.mixer = mixer
        self.norm2 = build_norm(norm, dim)
        self.mlp = nn.Sequential(nn.Conv2d(dim, mlp_ratio * dim, 1), nn.GELU(), nn.Conv2d(mlp_ratio * dim, dim, 1))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MetaNet(Backbone):
    """A pyramid at strides s, 2s, 4s, 8s, where s is `stem_stride`.

    Args:
        mixer: the name of an operator whose card says `mixer = true`; mixer_options go to its constructor.
        stem_stride: side of the non-overlapping patches, 4 as usual; 1 or 2 for small images.
        image_size: (height, width) or one number, in pixels; used by mixers whose weights depend on the place only.
        norm: of the blocks, the name of an operator whose card says `norm = true`; layer norm over channels if None.
    """

    def __init__(
        self, mixer: str = "depthwise", depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 320, 512), mlp_ratio: int = 4, stem_stride: int = 4,
        image_size: int | tuple[int, int] = 224, num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        mixer_options: Mapping[str, Any] | None = None, norm: str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, stem_stride * 2**i) for i, dim in enumerate(dims)]
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.downsamples, self.stages = nn.ModuleList(), nn.ModuleList()
        strides = (stem_stride, 2, 2, 2)
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            dim_in = in_chans if i == 0 else dims[i - 1]
            first = nn.Identity() if i == 0 else LayerNorm2d(dim_in)
            self.downsamples.append(nn.Sequential(first, nn.Conv2d(dim_in, dims[i], strides[i], strides[i])))
            height, width = height // strides[i], width // strides[i]
            mixers = [build_mixer(mixer, dims[i], (height, width), mixer_options or {}) for _ in rates]
            blocks = [Block(dims[i], m, mlp_ratio, rate, norm) for m, rate in zip(mixers, rates, strict=True)]
            self.stages.append(nn.Sequential(*blocks))
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        self._init_plain_parts()

    def _init_plain_parts(self) -> None:
        """Initialises everything but the mixers, which know best themselves."""
        parts = [self.downsamples, self.head]
        parts += [block.mlp for stage in self.stages for block in stage]
        for part in parts:
            init_weights_(part)

    def features(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        maps = []
        for downsample, stage in zip(self.downsamples, self.stages, strict=True):
            x = stage(downsample(x))
            maps.append(x)
        return maps

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.norm(x.mean((2, 3))))
