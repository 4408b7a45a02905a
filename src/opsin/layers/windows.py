"""Windows over an NHWC map, and the cyclic shift that lets neighbours meet (Swin, arXiv:2103.14030, fig. 4)."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

BLOCKED = -100.0  # added to the logits of pairs that are neighbours only because of the roll


class Shift(NamedTuple):
    """How far a map is rolled up and left, in tokens, and the additive mask of each window's pairs."""

    rows: int
    columns: int
    mask: Float[Tensor, "windows t t"]


def pad_to_windows(x: Float[Tensor, "n h w c"], window: tuple[int, int]) -> Float[Tensor, "n h2 w2 c"]:
    """Zeros below and to the right, up to multiples of the window."""
    below, right = -x.shape[1] % window[0], -x.shape[2] % window[1]
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x


def partition(x: Float[Tensor, "n h w c"], window: tuple[int, int]) -> Float[Tensor, "n windows t c"]:
    """Cuts a map whose sides are multiples of the window; windows and their t tokens in row-major order."""
    return rearrange(x, "n (i a) (j b) c -> n (i j) (a b) c", a=window[0], b=window[1])


def merge(
    windows: Float[Tensor, "n windows t c"], window: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "n h w c"]:
    """The inverse of `partition` for a map of `size` (height, width)."""
    rows = size[0] // window[0]
    return rearrange(windows, "n (i j) (a b) c -> n (i a) (j b) c", i=rows, a=window[0])


def shift_for(size: tuple[int, int], window: tuple[int, int], device: torch.device) -> Shift | None:
    """The shift by half a window for a map of `size`, None where one window holds the whole map.

    A side of a single window is not shifted.
    """
    height, width = (-(-side // step) * step for side, step in zip(size, window, strict=True))
    rows, columns = (step // 2 if side > step else 0 for side, step in zip((height, width), window, strict=True))
    if not rows and not columns:
        return None
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    band_y = (y >= height - window[0]).long() + (y >= height - rows).long()
    band_x = (x >= width - window[1]).long() + (x >= width - columns).long()
    region = partition((3 * band_y[:, None] + band_x)[None, ..., None], window)[0, ..., 0]
    mask = BLOCKED * (region[:, :, None] != region[:, None, :]).float()
    return Shift(rows, columns, mask)
