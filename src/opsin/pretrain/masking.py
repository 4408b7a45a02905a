"""Masks over an image, drawn in cells."""

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from opsin.errors import BadInput


def cell_mask(
    n: int, height: int, width: int, cell: int, ratio: float, device: torch.device | None = None
) -> Bool[Tensor, "n rows columns"]:
    """Which cells of `cell` x `cell` pixels are hidden: ceil(ratio * cells) of them, drawn anew for every image."""
    if height % cell or width % cell:
        raise BadInput(f"masks of {cell} pixels do not tile images of {height} x {width}; choose another mask_patch")
    cells = (height // cell) * (width // cell)
    rank = torch.rand(n, cells).argsort(1).argsort(1)
    return (rank < math.ceil(ratio * cells)).view(n, height // cell, width // cell).to(device)


def spread(mask: Bool[Tensor, "n rows columns"], height: int, width: int) -> Bool[Tensor, "n height width"]:
    """The mask of cells on a finer grid whose sides are multiples of its own."""
    rows, columns = mask.shape[1:]
    return mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)


def mean_distance_to_visible(mask: Bool[Tensor, "n h w"]) -> float:
    """AvgDist (SimMIM, section 4.1.2): mean Euclidean distance in pixels from hidden pixels to the nearest visible."""
    from scipy.ndimage import distance_transform_edt

    distances = [torch.from_numpy(distance_transform_edt(m.cpu().numpy()))[m.cpu()] for m in mask]
    return float(torch.cat(distances).mean())
