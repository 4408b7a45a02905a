"""The way from ResNet-50 to ConvNeXt-T, one change at a time (Liu et al. 2022, arXiv:2201.03545, section 2, table 10).

Every rung keeps the changes before it. The residual branch is three convolutions in one of three orders (fig. 3):

    bottleneck   1x1 C/4 -> k x k -> 1x1 C        stages of 4 * width channels
    inverted     1x1 4C  -> k x k -> 1x1 C        stages of width channels
    moved up     k x k   -> 1x1 4C -> 1x1 C

Where the paper is silent we keep what ResNet has: norm and activation after the stem's convolution, a norm in the
projecting shortcuts. A block's stride sits in its k x k convolution (version 1.5) until down-sampling gets a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from opsin.backbones import Backbone, FeatureInfo, through
from opsin.errors import UnknownName
from opsin.layers import DropPath, LayerNorm2d, drop_path_rates, init_weights_

Order = Literal["bottleneck", "inverted", "moved up"]


@dataclass(frozen=True)
class Rung:
    """What an architecture on the ladder has. norms: the convolutions (0, 1, 2) that a norm follows; acts: those that
    an activation follows, where 2 stands for the sum with the shortcut."""

    depths: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    patchify: bool = False
    depthwise: bool = False
    order: Order = "bottleneck"
    kernel_size: int = 3
    act: type[nn.Module] = nn.ReLU
    acts: tuple[int, ...] = (0, 1, 2)
    norms: tuple[int, ...] = (0, 1, 2)
    norm: Callable[[int], nn.Module] = nn.BatchNorm2d
    separate_downsampling: bool = False


CHANGES: dict[str, dict] = {
    "resnet": {},
    "stage_ratio": dict(depths=(3, 3, 9, 3)),
    "patchify": dict(patchify=True),
    "depthwise": dict(depthwise=True),
    "width": dict(width=96),
    "inverted": dict(order="inverted"),
    "moved_up": dict(order="moved up"),
    "kernel_7": dict(kernel_size=7),
    "gelu": dict(act=nn.GELU),
    "fewer_acts": dict(acts=(1,)),
    "fewer_norms": dict(norms=(0,)),
    "layer_norm": dict(norm=LayerNorm2d),
    "separate_downsampling": dict(separate_downsampling=True),
}
STEPS = tuple(CHANGES)
VARIANTS = {f"convnext_ladder_{step}": dict(step=step) for step in STEPS}


def rung_of(step: str) -> Rung:
    """The architecture after all changes up to `step`. Raises UnknownName."""
    if step not in STEPS:
        raise UnknownName("step of the ConvNeXt ladder", step, STEPS)
    rung = Rung()
    for name in STEPS[: STEPS.index(step) + 1]:
        rung = replace(rung, **CHANGES[name])
    return rung


class Block(nn.Module):
    """Three convolutions and a shortcut, as the rung says."""

    def __init__(self, dim_in: int, dim: int, stride: int, rung: Rung, drop_path: float):
        super().__init__()
        convs = three_convolutions(dim_in, dim, stride, rung)
        self.branch = nn.Sequential()
        for i, conv in enumerate(convs):
            self.branch.append(conv)
            if i in rung.norms:
                self.branch.append(rung.norm(conv.out_channels))
            if i in rung.acts and i < 2:
                self.branch.append(rung.act())
        self.drop_path = DropPath(drop_path)
        same = dim_in == dim and stride == 1
        projection = nn.Sequential(nn.Conv2d(dim_in, dim, 1, stride, bias=False), rung.norm(dim)) if not same else None
        self.shortcut = projection or nn.Identity()
        self.act = rung.act() if 2 in rung.acts else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return self.act(self.shortcut(x) + self.drop_path(self.branch(x)))


def three_convolutions(dim_in: int, dim: int, stride: int, rung: Rung) -> list[nn.Conv2d]:
    """The convolutions of a block in the rung's order; a convolution has a bias if no norm follows it directly."""
    hidden = dim // 4 if rung.order == "bottleneck" else 4 * dim
    spatial = dim_in if rung.order == "moved up" else hidden
    groups = spatial if rung.depthwise else 1
    bias = [i not in rung.norms or rung.norm is not nn.BatchNorm2d for i in range(3)]
    at = 0 if rung.order == "moved up" else 1  # where the spatial convolution stands
    k = rung.kernel_size
    kxk = nn.Conv2d(spatial, spatial, k, stride, k // 2, groups=groups, bias=bias[at])
    if rung.order == "moved up":
        return [kxk, nn.Conv2d(dim_in, hidden, 1, bias=bias[1]), nn.Conv2d(hidden, dim, 1, bias=bias[2])]
    return [nn.Conv2d(dim_in, hidden, 1, bias=bias[0]), kxk, nn.Conv2d(hidden, dim, 1, bias=bias[2])]


def stem(in_chans: int, dim: int, stride: int, rung: Rung) -> nn.Sequential:
    """Patches of side `stride`, or ResNet's convolution of stride/2 and max-pooling (7x7, or 3x3 at stride 2)."""
    act = nn.Identity() if rung.acts == (1,) else rung.act()
    if rung.patchify:
        return nn.Sequential(nn.Conv2d(in_chans, dim, stride, stride), rung.norm(dim), act)
    kernel = 7 if stride == 4 else 3
    conv = nn.Conv2d(in_chans, dim, kernel, stride // 2, kernel // 2, bias=False)
    return nn.Sequential(conv, rung.norm(dim), act, nn.MaxPool2d(3, 2, 1))


class LadderNet(Backbone):
    """A rung of the ladder: a pyramid at strides s, 2s, 4s, ..., where s is `stem_stride`.

    Args:
        step: the last change that is in, one of STEPS. drop_path: the last block's rate.
        width, depths: channels and blocks in place of the rung's, for small experiments.
        stem_stride: 4, or 2 for small images.
    """

    def __init__(
        self, step: str = "separate_downsampling", num_classes: int = 1000, in_chans: int = 3, drop_path: float = 0.0,
        width: int | None = None, depths: Sequence[int] | None = None, stem_stride: int = 4,
    ):  # fmt: skip
        super().__init__()
        rung = rung_of(step)
        rung = replace(rung, width=width or rung.width, depths=depths or rung.depths)
        factor = 4 if rung.order == "bottleneck" else 1
        dims = [factor * rung.width * 2**i for i in range(len(rung.depths))]
        self.rung, self.num_classes, self.num_features = rung, num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, stem_stride * 2**i) for i, dim in enumerate(dims)]
        self.stem = stem(in_chans, rung.width, stem_stride, rung)
        self.stages = nn.Sequential()
        dim_in = rung.width
        for i, rates in enumerate(drop_path_rates(drop_path, rung.depths)):
            self.stages.append(self._stage(dim_in, dims[i], 2 if i else 1, rates))
            dim_in = dims[i]
        self.norm = rung.norm(dims[-1]) if rung.separate_downsampling else nn.Identity()
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()
        init_weights_(self)

    def _stage(self, dim_in: int, dim: int, stride: int, rates: Sequence[float]) -> nn.Sequential:
        layers: list[nn.Module] = []
        if self.rung.separate_downsampling and stride > 1:
            layers = [self.rung.norm(dim_in), nn.Conv2d(dim_in, dim, stride, stride)]
            dim_in, stride = dim, 1
        for i, rate in enumerate(rates):
            first = i == 0
            layers.append(Block(dim_in if first else dim, dim, stride if first else 1, self.rung, rate))
        return nn.Sequential(*layers)

    def features(self, x: Float[Tensor, "n k h w"]) -> list[Float[Tensor, "n _c _h _w"]]:
        return through(self.stages, self.stem(x))

    def forward_head(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.head(self.norm(x.mean((2, 3), keepdim=True)).flatten(1))
