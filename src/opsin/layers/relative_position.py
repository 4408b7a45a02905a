"""Biases of attention that depend on the offset between two tokens of a grid.

A table holds one number per offset and head: row (dy + H - 1) (2W - 1) + (dx + W - 1) for query minus key = (dy, dx).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


def relative_position_index(height: int, width: int, device: torch.device | None = None) -> Int[Tensor, "t t"]:
    """The row of the table for every pair (query, key) of a grid, t = height * width tokens in row-major order."""
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    dy = y[:, None, None, None] - y[None, None, :, None] + height - 1
    dx = x[None, :, None, None] - x[None, None, None, :] + width - 1
    return (dy * (2 * width - 1) + dx).reshape(height * width, height * width)


def resize_table(
    table: Float[Tensor, "rows heads"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "rows2 heads"]:
    """The table of grid `old` for grid `new`, each (height, width) in tokens, by bicubic interpolation."""
    if old == new:
        return table
    (h, w), (h2, w2) = old, new
    plane = table.float().view(1, 2 * h - 1, 2 * w - 1, -1).permute(0, 3, 1, 2)
    plane = F.interpolate(plane, size=(2 * h2 - 1, 2 * w2 - 1), mode="bicubic", align_corners=False)
    return plane.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)


class RelativePositionBias(nn.Module):
    """The bias of a whole-image transformer with a class token in front (BEiT, Bao et al. 2021, arXiv:2106.08254).

    The last three rows are for class to patch, patch to class, and class to itself. A grid other than `grid` gets an
    interpolated table.
    """

    no_weight_decay = ("relative_position_bias_table",)

    def __init__(self, grid: tuple[int, int], num_heads: int):
        super().__init__()
        self.grid = grid
        offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets + 3, num_heads))

    def forward(self, grid: tuple[int, int]) -> Float[Tensor, "1 heads t t"]:
        """grid: height and width of the image in tokens; t = 1 + height * width."""
        table = self.relative_position_bias_table
        patches = resize_table(table[:-3], self.grid, grid)
        patches = patches[relative_position_index(*grid, device=table.device)].permute(2, 0, 1)
        from_class, to_class, to_itself = table[-3:, :, None, None]
        heads, t = patches.shape[:2]
        bias = torch.cat((to_class.expand(heads, t, 1), patches), 2)
        top = torch.cat((to_itself, from_class.expand(heads, 1, t)), 2)
        return torch.cat((top, bias), 1)[None]
