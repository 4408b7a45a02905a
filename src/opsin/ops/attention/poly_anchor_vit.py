"""Adaptive polyphase anchoring: let the image choose where the grid of patches or windows begins.

Ding et al. 2023, "Reviving Shift Equivariance in Vision Transformers", arXiv:2306.07470. A stride or a window of s x s
cuts the map on a fixed grid, so that an image moved by one pixel is cut elsewhere. Anchoring moves the map circularly
such that the strongest of its s^2 polyphase components comes first (section 3.2, algorithm 1):

    P_s(x) = roll(x, -(p_y, p_x)),   (p_y, p_x) = argmax over phases of || x[p_y::s, p_x::s] ||_2

Then P_s(roll(x, t)) = roll(P_s(x), s m) for some integers m: whatever commutes with shifts by multiples of s, as a
convolution of stride s, attention in s x s windows, or s x s keys that become one, commutes with all shifts, and what
is pooled at the end ignores them. Nothing is learned, and no gradient passes through the argmax.

The paper leaves features in the anchored frame, and so do the networks in `opsin.backbones.polyvit` and `polytwins`.
The operator here is for blocks with a shortcut, and moves its result back: op(roll(x, t)) = roll(op(x), t) for all t.
"""

from functools import reduce

import torch
from jaxtyping import Float, Int
from torch import Tensor

from opsin.layers.tokens import taken
from opsin.layers.windows import pad_to_windows
from opsin.ops.attention.window_attention import WindowAttention


@torch.no_grad()
def phases(x: Float[Tensor, "n c h w"], stride: tuple[int, int]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Row and column of the strongest polyphase component of every map; 0 along a side that the stride does not divide.

    Tokens' norms are taken in float32 at least and added in float64 (float32 on MPS, which has none): a shift changes
    the order of the sum, which must not change the answer. Components that tie (a constant image) have none: then it is
    the first.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    single, (height, width) = torch.promote_types(x.dtype, torch.float32), x.shape[2:]
    rows, columns = (s if side % s == 0 else 1 for side, s in zip((height, width), stride, strict=True))
    if x.stride(1) == 1:  # channels last: without a copy of the map
        energy = torch.linalg.vector_norm(x, dim=1, dtype=single).square()
    elif x.shape[1] <= 4:  # an image: plane by plane
        energy = reduce(torch.add, (plane.to(single).square() for plane in x.unbind(1)))
    else:
        energy = x.to(single).square().sum(1)
    energy = energy.view(-1, height // rows, rows, width).sum(1, dtype=exact)
    best = energy.view(-1, rows, width // columns, columns).sum(2).flatten(1).argmax(1)
    return best // columns, best % columns


def rolled(size: tuple[int, int], by: tuple[Int[Tensor, " n"], Int[Tensor, " n"]]) -> tuple[Tensor, Tensor]:
    """Rows (n, h) and columns (n, w) that come to every place when planes of `size` are moved up and left by `by`."""
    rows, columns = ((torch.arange(s, device=b.device) + b[:, None]) % s for s, b in zip(size, by, strict=True))
    return rows, columns


def anchor(x: Float[Tensor, "n c h w"], stride: int | tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """P_s of every map, in the memory format that it has. A side that the stride does not divide stays where it is."""
    stride = (stride, stride) if isinstance(stride, int) else stride
    rows, columns = rolled((x.shape[2], x.shape[3]), phases(x, stride))
    down, right = (rows * x.shape[3])[:, :, None], columns[:, None]
    if x.stride(1) == 1:  # channels last: whole tokens move
        return taken(x.permute(0, 2, 3, 1).flatten(1, 2), down, right).permute(0, 3, 1, 2)
    index = (down + right).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, index).unflatten(2, x.shape[2:])


class PolyAnchorAttention(WindowAttention):
    """(N, C, H, W) -> the same: attention in windows that begin where the map says.

    Commutes with every circular shift along a side that `window_size` divides; along another the windows are fixed and
    filled up with zeros. Choosing the windows costs nothing beyond cutting them: both are one look-up.

    Args and errors: as of WindowAttention, whose parameters it has.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        (height, width), (a, b), by = x.shape[2:], self.window, phases(x, self.window)
        padded = pad_to_windows(x.permute(0, 2, 3, 1), self.window)
        size = padded.shape[1], padded.shape[2]
        rows, columns = rolled(size, by)
        down, right = (rows * size[1]).unflatten(1, (-1, a)), columns.unflatten(1, (-1, b))
        windows = taken(padded.flatten(1, 2), down[:, :, None, :, None], right[:, None, :, None])
        mixed = self.attend(windows.flatten(3, 4).flatten(1, 2)).flatten(1, 2)
        rows, columns = (where[:, :side] for where, side in zip(rolled(size, (-by[0], -by[1])), (height, width)))
        # windows before this one, in rows of windows and in the row; and tokens of this one before this token
        down = rows // a * (a * size[1]) + rows % a * b
        right = columns // b * (a * b) + columns % b
        kept = taken(mixed, down[:, :, None], right[:, None])
        return self.proj(kept).permute(0, 3, 1, 2)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Sample by sample: all components and their norms, roll, attention in fixed windows, roll back."""
        return torch.cat([self._anchored(sample[None]) for sample in x])

    def _anchored(self, x: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h w"]:
        rows, columns = (s if side % s == 0 else 1 for side, s in zip(x.shape[2:], self.window))
        norms = {(i, j): x[..., i::rows, j::columns].detach().norm() for i in range(rows) for j in range(columns)}
        down, right = max(norms, key=lambda place: float(norms[place]))
        return super().reference(x.roll((-down, -right), (2, 3))).roll((down, right), (2, 3))
