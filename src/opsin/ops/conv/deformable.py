"""Deformable convolution: every tap of every output position reads the input where a learned offset points.

Dai et al. 2017, arXiv:1703.06211 (version 1), and Zhu et al. 2018, arXiv:1811.11168 (version 2, with a mask m):

    y(p) = sum_k W_k m_k(p) x(s p - pad + d k + offset_k(p)),   x(q) = sum_{corners c of q} share_c(q) x(c)

`x` between pixels is bilinear, and zero outside. Offsets are (dy, dx) per tap, taps row by row, offset groups
outermost, as in torchvision. At whole positions the derivative is the one to the right.

The fast path keeps the channels innermost. Reading a tap at all positions is then a sum of four weighted rows of one
table, an embedding bag, and taps are added up one by one: nothing nine times as large as the map is ever in memory.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.precision import without_autocast

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Taps, and how they move over the map."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    def out_size(self, size: Pair) -> Pair:
        """(height, width) of the map that comes out."""
        height, width = (
            (length + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
            for length, taps, stride, pad, dilation in zip(size, *self, strict=True)
        )
        return height, width

    def places(self, size: Pair, like: Tensor) -> tuple[Float[Tensor, "k i 1"], Float[Tensor, "k 1 j"]]:
        """Rows and columns that the taps read without offsets."""
        (rows, columns), axes = self.out_size(size), []
        for axis, count in enumerate((rows, columns)):
            tap = self.dilation[axis] * torch.arange(self.kernel[axis], device=like.device) - self.padding[axis]
            axes.append(tap[:, None] + self.stride[axis] * torch.arange(count, device=like.device))
        vertical = axes[0].repeat_interleave(self.kernel[1], 0)[:, :, None]
        horizontal = axes[1].repeat(self.kernel[0], 1)[:, None, :]
        return vertical.to(like.dtype), horizontal.to(like.dtype)


class Corners(NamedTuple):
    """The four pixels around every sampled point: where they are in the flattened map, and their shares."""

    index: Int[Tensor, "k n i j g 4"]
    share: Float[Tensor, "k n i j g 4"]


def corners(offset: Float[Tensor, "n o i j"], size: Pair, geometry: Geometry) -> Corners:
    """Bilinear shares, zero for pixels outside the map of `size`; o = 2 g k."""
    taps = geometry.taps
    parts = offset.unflatten(1, (-1, taps, 2)).permute(3, 2, 0, 4, 5, 1)  # 2 k n i j g
    index, share = [], []
    for length, part, place in zip(size, parts, geometry.places(size, offset), strict=True):
        at = (part + place[:, None, :, :, None]).clamp(-1, length)
        low = at.detach().floor()
        above = at - low
        low = low.long()
        inside = torch.stack(((low >= 0) & (low < length), low < length - 1), -1)
        share.append(torch.stack((1 - above, above), -1) * inside)
        index.append(torch.stack((low, low + 1), -1).clamp(0, length - 1))
    flat = index[0][..., :, None] * size[1] + index[1][..., None, :]
    return Corners(flat.flatten(-2), (share[0][..., :, None] * share[1][..., None, :]).flatten(-2))


class TapSum(torch.autograd.Function):
    """sum_k W_k (sum_c share_kc table[row_kc]) over rows of channels.

    table: (rows x offset groups, channels of one). row, share: (k, points x offset groups, 4).
    weight: (k, groups, channels in, channels out), or (k, channels) where every channel has its own filter.
    """

    @staticmethod
    def forward(
        ctx: Any, table: Float[Tensor, "r c"], row: Int[Tensor, "k p 4"], share: Float[Tensor, "k p 4"], weight: Tensor
    ) -> Float[Tensor, "q m"]:
        ctx.save_for_backward(table, row, share, weight)
        total: Tensor | None = None
        for indices, shares, taps in zip(row, share, weight, strict=True):
            total = _add(total, _read(table, indices, shares, taps), taps)
        assert total is not None
        return total if weight.ndim == 2 else total.transpose(0, 1).flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, "q m"]) -> tuple[Tensor | None, ...]:
        table, row, share, weight = ctx.saved_tensors
        for_table, _, for_share, for_weight = ctx.needs_input_grad
        grad = grad.contiguous() if weight.ndim == 2 else grad.unflatten(1, (weight.shape[1], -1)).transpose(0, 1)
        table_grad = torch.zeros_like(table) if for_table else None
        share_grad = torch.empty_like(share) if for_share else None
        weight_grad = torch.empty_like(weight) if for_weight else None
        bag = torch.arange(row.shape[1], device=row.device).repeat_interleave(4)
        starts = 4 * torch.arange(row.shape[1], device=row.device)
        for k, (indices, shares, taps) in enumerate(zip(row, share, weight, strict=True)):
            if weight_grad is not None:
                weight_grad[k] = _weight_grad(grad, _read(table, indices, shares, taps))
            back = _input_grad(grad, taps).reshape(len(indices), -1)
            if share_grad is not None:
                share_grad[k] = torch.ops.aten._embedding_bag_per_sample_weights_backward(
                    back, table, indices.flatten(), starts, bag, 0
                ).view_as(shares)
            if table_grad is not None:
                for c in range(4):
                    table_grad.index_add_(0, indices[:, c], back * shares[:, c, None])
        return table_grad, None, share_grad, weight_grad


def _read(table: Tensor, indices: Tensor, shares: Tensor, taps: Tensor) -> Tensor:
    """What one tap sees: (points, channels), or (groups, points, channels of one)."""
    seen = F.embedding_bag(indices, table, per_sample_weights=shares, mode="sum")
    return seen.view(-1, *taps.shape[:1]) if taps.ndim == 1 else seen.view(-1, *taps.shape[:2]).transpose(0, 1)


def _add(total: Tensor | None, seen: Tensor, taps: Tensor) -> Tensor:
    if total is None:
        return seen * taps if taps.ndim == 1 else seen @ taps
    return total.addcmul_(seen, taps) if taps.ndim == 1 else total.baddbmm_(seen, taps)


def _weight_grad(grad: Tensor, seen: Tensor) -> Tensor:
    return (grad * seen).sum(0) if grad.ndim == 2 else seen.transpose(1, 2) @ grad


def _input_grad(grad: Tensor, taps: Tensor) -> Tensor:
    return grad * taps if taps.ndim == 1 else (grad @ taps.transpose(1, 2)).transpose(0, 1)


def defined_deform_conv2d(
    x: Float[Tensor, "n c h w"], offset: Float[Tensor, "n o i j"], weight: Float[Tensor, "m d u v"],
    geometry: Geometry, mask: Float[Tensor, "n q i j"] | None = None,
) -> Float[Tensor, "n m i j"]:  # fmt: skip
    """The definition: all taps' samples side by side, then the filters."""
    n, channels, height, width = x.shape
    size, groups = geometry.out_size((height, width)), channels // weight.shape[1]
    index, share = (part.permute(1, 4, 0, 5, 2, 3).flatten(2) for part in _masked(offset, mask, x, geometry))
    pixels = x.reshape(n, index.shape[1], -1, height * width)
    near = pixels.gather(3, index[:, :, None].expand(-1, -1, pixels.shape[2], -1)) * share[:, :, None].to(x.dtype)
    samples = near.reshape(n, groups, weight.shape[1], geometry.taps, 4, -1).sum(4)
    filters = weight.flatten(2).unflatten(0, (groups, -1))
    return torch.einsum("ngdkp,gmdk->ngmp", samples, filters).reshape(n, -1, *size)


def fast_deform_conv2d(
    x: Float[Tensor, "n c h w"], offset: Float[Tensor, "n o i j"], weight: Float[Tensor, "m d u v"],
    geometry: Geometry, mask: Float[Tensor, "n q i j"] | None = None,
) -> Float[Tensor, "n m i j"]:  # fmt: skip
    """The same by `TapSum`, channels last in memory."""
    n, channels, height, width = x.shape
    groups = channels // weight.shape[1]
    index, share = _masked(offset, mask, x, geometry)
    taps, offset_groups, size = geometry.taps, index.shape[4], index.shape[2:4]
    sample = torch.arange(n, device=x.device)[:, None, None, None, None] * (height * width)
    row = (index + sample) * offset_groups + torch.arange(offset_groups, device=x.device)[:, None]
    table = x.permute(0, 2, 3, 1).reshape(n * height * width * offset_groups, -1).to(share.dtype)
    if weight.shape[0] == channels == groups:
        filters = weight.reshape(channels, taps).T
    else:
        filters = weight.reshape(groups, -1, weight.shape[1], taps).permute(3, 0, 2, 1)
    filters = filters.contiguous().to(share.dtype)
    with without_autocast(x.device.type):
        y = TapSum.apply(table, row.reshape(taps, -1, 4), share.reshape(taps, -1, 4), filters)
    return y.view(n, *size, -1).permute(0, 3, 1, 2).to(x.dtype)


def _masked(offset: Tensor, mask: Tensor | None, x: Tensor, geometry: Geometry) -> Corners:
    """Corners in at least float32, their shares times the mask."""
    dtype = torch.promote_types(offset.dtype, torch.float32)
    index, share = corners(offset.to(dtype), (x.shape[2], x.shape[3]), geometry)
    if mask is not None:
        share = share * mask.to(dtype).unflatten(1, (-1, geometry.taps)).permute(2, 0, 3, 4, 1)[..., None]
    return Corners(index, share)


def check_offsets(x: Tensor, offset: Tensor, weight: Tensor, geometry: Geometry, mask: Tensor | None) -> None:
    """Raises BadInput where the shapes do not go together."""
    size, taps, channels = geometry.out_size((x.shape[2], x.shape[3])), geometry.taps, x.shape[1]
    if min(size) < 1 or tuple(offset.shape[2:]) != size or offset.shape[1] % (2 * taps):
        raise BadInput(
            f"offsets of shape {tuple(offset.shape)} do not fit: {taps} taps on a map of {x.shape[2]}x{x.shape[3]} "
            f"need (n, a multiple of {2 * taps}, {size[0]}, {size[1]})"
        )
    if mask is not None and (mask.shape[1] * 2 != offset.shape[1] or mask.shape[2:] != offset.shape[2:]):
        raise BadInput(f"a mask of shape {tuple(mask.shape)} does not fit offsets of shape {tuple(offset.shape)}")
    offset_groups = offset.shape[1] // (2 * taps)
    if channels % weight.shape[1] or channels % offset_groups or len(weight) % (channels // weight.shape[1]):
        raise BadInput(
            f"{channels} channels cannot be shared by filters of shape {tuple(weight.shape)} and {offset_groups} "
            "offset groups"
        )


def deform_conv2d(
    x: Float[Tensor, "n c h w"], offset: Float[Tensor, "n o i j"], weight: Float[Tensor, "m d u v"],
    bias: Float[Tensor, " m"] | None = None, stride: Pair = (1, 1), padding: Pair = (0, 0), dilation: Pair = (1, 1),
    mask: Float[Tensor, "n q i j"] | None = None,
) -> Float[Tensor, "n m i j"]:  # fmt: skip
    """Deformable convolution with the semantics of `torchvision.ops.deform_conv2d`.

    offset: o = 2 g k channels for g offset groups and k taps, in pixels. mask: q = g k channels. Groups follow from
    the weight's d = c / groups. Compilers and the meta device get the definition. Raises BadInput: shapes.
    """
    geometry = Geometry((weight.shape[2], weight.shape[3]), stride, padding, dilation)
    check_offsets(x, offset, weight, geometry, mask)
    compute = defined_deform_conv2d if x.is_meta or torch.compiler.is_compiling() else fast_deform_conv2d
    y = compute(x, offset, weight, geometry, mask)
    return y if bias is None else y + bias[:, None, None]


class DeformConv2d(nn.Conv2d):
    """A convolution whose offsets (and masks) come with the input: `forward(x, offset, mask)`.

    Weights are uniform in +-1/sqrt(channels in x taps), counting all channels as the authors of deformable convolution
    do.
    """

    def __init__(
        self, dim: int, out_dim: int, kernel_size: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1,
        bias: bool = False,
    ):  # fmt: skip
        padding = dilation * (kernel_size // 2)
        super().__init__(dim, out_dim, kernel_size, stride, padding, dilation=dilation, groups=groups, bias=bias)
        nn.init.uniform_(self.weight, -1, 1).data.mul_((dim * kernel_size**2) ** -0.5)

    def forward(  # type: ignore[override]
        self,
        x: Float[Tensor, "n c h w"],
        offset: Float[Tensor, "n o i j"],
        mask: Float[Tensor, "n q i j"] | None = None,
    ) -> Float[Tensor, "n m i j"]:  # fmt: skip
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def reference(
        self,
        x: Float[Tensor, "n c h w"],
        offset: Float[Tensor, "n o i j"],
        mask: Float[Tensor, "n q i j"] | None = None,
    ) -> Float[Tensor, "n m i j"]:  # fmt: skip
        """The same by the definition."""
        geometry = Geometry((self.weight.shape[2], self.weight.shape[3]), self.stride, self.padding, self.dilation)
        y = defined_deform_conv2d(x, offset, self.weight, geometry, mask)
        return y if self.bias is None else y + self.bias[:, None, None]
