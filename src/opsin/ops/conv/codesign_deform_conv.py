"""Deformable convolutions that hardware likes: a ladder from free offsets down to one whole number per position.

Huang et al. 2020, "Algorithm-hardware Co-design for Deformable Convolution", arXiv:2002.08357, and its detector CoDeNet
(Dong et al. 2020, arXiv:2006.08357). Free offsets mean random access to the whole map and an expensive predictor; step
by step they are confined (a_k are the k anchors (dy, dx) of the ordinary kernel, s a map predicted from x):

    full        offsets from a 3x3 convolution, dense filters                     9 C 18 + 9 C M  products per position
    modulated   the same with a sigmoid mask per tap (version 2)                  9 C 27 + 9 C M
    depthwise   one filter per channel, channels mixed by 1x1                     9 C 18 + 9 C + C M
    bounded     offsets clamped to [-r, r]: 2r + 3 rows of the map are enough     the same
    square      p_k = s a_k, s = clamp(w x + b, 1 - r, r): one number for all     C + 9 C + C M
                taps, a dilation that follows the image; 2r + 1 rows
    rounded     s rounded, straight through in training: no interpolation         the same

s = 1 is the ordinary grid, where training starts, s = 2 dilation 2, s = 0 the centre alone. The square rung with r = 8
is CoDeNet's operator, and the default. Names of its parameters follow the official repository, Zhen-Dong/CoDeNet.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName
from opsin.layers.fake_quant import straight_through
from opsin.ops.conv.deformable import DeformConv2d

Offsets = tuple[Float[Tensor, "n o i j"], Float[Tensor, "n q i j"] | None]


class FreeOffsets(nn.Module):
    """(dy, dx) for every tap from a convolution that starts at zero."""

    def __init__(self, dim: int, kernel_size: int, stride: int, bound: int, groups: int):
        super().__init__()
        self.conv_offset = self.predictor(dim, 2 * kernel_size**2 * groups, kernel_size, stride)
        self.bound = bound

    @staticmethod
    def predictor(dim: int, outputs: int, kernel_size: int, stride: int) -> nn.Conv2d:
        conv = nn.Conv2d(dim, outputs, kernel_size, stride, kernel_size // 2)
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
        return conv

    def forward(self, x: Float[Tensor, "n c h w"]) -> Offsets:
        return self.conv_offset(x), None


class ModulatedOffsets(FreeOffsets):
    """And a mask for every tap, which starts at a half."""

    def __init__(self, dim: int, kernel_size: int, stride: int, bound: int, groups: int):
        super().__init__(dim, kernel_size, stride, bound, groups)
        self.conv_mask = self.predictor(dim, kernel_size**2 * groups, kernel_size, stride)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Offsets:
        return self.conv_offset(x), self.conv_mask(x).sigmoid()


class BoundedOffsets(FreeOffsets):
    """Free inside [-bound, bound]."""

    def forward(self, x: Float[Tensor, "n c h w"]) -> Offsets:
        return self.conv_offset(x).clamp(-self.bound, self.bound), None


class SquareOffsets(nn.Module):
    """The taps stay a square, s times as wide: offsets (s - 1) a_k from one number per position and group."""

    anchors: Float[Tensor, "1 1 o 1 1"]

    def __init__(self, dim: int, kernel_size: int, stride: int, bound: int, groups: int):
        super().__init__()
        self.conv_scale = nn.Conv2d(dim, groups, 1, stride)
        nn.init.zeros_(self.conv_scale.weight)
        nn.init.ones_(self.conv_scale.bias)
        self.bound = bound
        steps = torch.arange(kernel_size) - kernel_size // 2
        self.register_buffer("anchors", torch.cartesian_prod(steps, steps).view(1, 1, -1, 1, 1), persistent=False)

    def scale(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n g i j"]:
        """s, in kernel steps."""
        return self.conv_scale(x).clamp(1 - self.bound, self.bound)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Offsets:
        s = self.scale(x)
        return ((s[:, :, None] - 1) * self.anchors.to(s.dtype)).flatten(1, 2), None


class RoundedOffsets(SquareOffsets):
    """Whole s: every tap reads one pixel."""

    def scale(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n g i j"]:
        return straight_through(super().scale(x), torch.round)


OFFSETS: dict[str, type[nn.Module]] = {
    "full": FreeOffsets, "modulated": ModulatedOffsets, "depthwise": FreeOffsets, "bounded": BoundedOffsets,
    "square": SquareOffsets, "rounded": RoundedOffsets,
}  # fmt: skip
DENSE = ("full", "modulated")


class CodesignDeformConv(nn.Module):
    """(N, C, H, W) -> (N, M, H', W'), the shape kept by default. No bias.

    Args:
        form: a rung of the ladder (see the module).
        kernel_size: odd. stride: as of a convolution, also of the offsets' predictor.
        bound: r, largest offset of a tap in pixels (bounded), or largest s (square, rounded).
        offset_groups: groups of channels with offsets of their own.
        out_dim: M. Where it differs from C, the depthwise rungs end with a 1x1 convolution.
    Raises UnknownName: the form. BadInput: an even kernel, a bound below 1.
    """

    def __init__(
        self, dim: int, form: str = "square", kernel_size: int = 3, stride: int = 1, bound: int = 8,
        offset_groups: int = 1, out_dim: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if form not in OFFSETS:
            raise UnknownName("form", form, OFFSETS)
        if kernel_size % 2 == 0 or bound < 1:
            raise BadInput(f"kernel_size={kernel_size}, bound={bound}: the kernel must be odd and the bound at least 1")
        out_dim = out_dim or dim
        self.form = form
        self.offsets = OFFSETS[form](dim, kernel_size, stride, bound, offset_groups)
        dense = form in DENSE
        self.conv = DeformConv2d(dim, out_dim if dense else dim, kernel_size, stride, groups=1 if dense else dim)
        self.conv_channel = nn.Identity() if dense or out_dim == dim else nn.Conv2d(dim, out_dim, 1, bias=False)
        if isinstance(self.conv_channel, nn.Conv2d):
            nn.init.kaiming_normal_(self.conv_channel.weight, nonlinearity="relu")

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m i j"]:
        return self.conv_channel(self.conv(x, *self.offsets(x)))

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m i j"]:
        """The same with all taps' samples side by side."""
        return self.conv_channel(self.conv.reference(x, *self.offsets(x)))

    def extra_repr(self) -> str:
        return f"form={self.form}"


def operator_macs(form: str, dim: int, out_dim: int, positions: int, kernel_size: int = 3) -> int:
    """Multiply-adds on a map of `positions`, with one offset group; interpolation (4 more per sample) not counted.

    Raises UnknownName.
    """
    if form not in OFFSETS:
        raise UnknownName("form", form, OFFSETS)
    taps = kernel_size**2
    numbers = {"full": 2 * taps, "modulated": 3 * taps, "depthwise": 2 * taps, "bounded": 2 * taps}
    predictor = dim * numbers[form] * taps if form in numbers else dim
    mixing = 0 if form in DENSE or out_dim == dim else dim * out_dim
    filters = dim * out_dim * taps if form in DENSE else dim * taps
    return positions * (predictor + filters + mixing)


def window_rows(form: str, height: int, bound: int = 8, kernel_size: int = 3) -> int:
    """Input rows that one output row may read at stride 1: what a line buffer must hold. Raises UnknownName."""
    if form not in OFFSETS:
        raise UnknownName("form", form, OFFSETS)
    reach = {"bounded": bound + kernel_size // 2, "square": bound * (kernel_size // 2)}
    reach["rounded"] = reach["square"]
    return min(height, 2 * reach[form] + 1) if form in reach else height
