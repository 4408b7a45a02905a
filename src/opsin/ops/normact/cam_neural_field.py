"""Coordinate-aware modulation: normalise what a position holds, then scale and shift it as its coordinate says.

Lee et al. 2023, "Coordinate-Aware Modulation for Neural Fields", arXiv:2311.14993. A multilayer perceptron of
coordinates is compact and slow to learn detail; a grid of features learns fast and is large. Here the network keeps the
features and a small grid holds two numbers per place, the same two for all features (section 3.1):

    y = gamma(X) (h - mean(h)) / std(h) + beta(X),    gamma(X), beta(X) linear between the nodes of a small grid

Mean and standard deviation are over the features of one position, so positions do not see each other. The grid spans
the map from edge to edge (its outer nodes are at coordinates 0 and 1), whatever the map's resolution; pixel i of n has
the coordinate (i + 1/2) / n. For video the numbers depend on time and channel instead (section 3.2).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput

EPS = 1e-5


def interpolated(grid: Float[Tensor, "k *size"], places: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
    """Values between the nodes of a grid with d = 1, 2 or 3 axes, in float32.

    places: one coordinate per axis of the grid and in its order; 0 is the first node, 1 the last, and beyond them the
    value of the nearest one holds.
    """
    grid, places = grid.float(), places.float()
    if grid.ndim == 2:
        grid, places = grid[:, None], torch.cat((torch.zeros_like(places), places), 1)
    axes = places.shape[1]
    points = (2 * places.flip(1) - 1).view(1, -1, *[1] * (axes - 1), axes)
    return F.grid_sample(grid[None], points, padding_mode="border", align_corners=True).flatten(1).view(len(grid), -1).T


def pixel_centres(*size: int, device: torch.device | None = None) -> Float[Tensor, "n d"]:
    """Coordinates in [0, 1] of the pixels of a map (height, width), or of d axes, the last axis fastest."""
    axes = [(torch.arange(side, device=device) + 0.5) / side for side in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


class Modulation(nn.Module):
    """Places (n, d) to a scale and a shift (n, 1) each, from a grid of d axes; at first 1 and 0 everywhere.

    Args: size: nodes per axis.
    """

    def __init__(self, *size: int):
        super().__init__()
        if min(size) < 2 or len(size) > 3:
            raise BadInput(f"a modulation grid has 1 to 3 axes of at least 2 nodes, not {size}")
        self.grid = nn.Parameter(torch.stack((torch.ones(size), torch.zeros(size))))

    def forward(self, places: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        scale, shift = interpolated(self.grid, places).split(1, 1)
        return scale, shift

    def extra_repr(self) -> str:
        return "x".join(map(str, self.grid.shape[1:]))


class TriPlane(nn.Module):
    """Places (n, 3) to a scale and a shift (n, 1) each, from three planes: (0, 1), (0, 2) and (1, 2).

    The scale is the product of the planes' values and the shift their sum. (The official code multiplies shifts too;
    from planes of zeros such a product has no gradient, and never leaves zero.)
    """

    def __init__(self, side: int):
        super().__init__()
        self.grid = nn.Parameter(torch.stack((torch.ones(3, side, side), torch.zeros(3, side, side)), 1))

    def forward(self, places: Float[Tensor, "n 3"]) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 1"]]:
        points = 2 * torch.stack([places[:, axes] for axes in ([1, 0], [2, 0], [2, 1])]) - 1
        values = F.grid_sample(self.grid, points[:, :, None], padding_mode="border", align_corners=True)[..., 0]
        return values[:, 0].prod(0)[:, None], values[:, 1].sum(0)[:, None]


class CoordinateAwareModulation(nn.Module):
    """(N, C, H, W) -> the same: each position normalised over its channels, then scaled and shifted by its place.

    Args: dim: C. grid_size: nodes per side of the grid.
    """

    def __init__(self, dim: int, grid_size: int | tuple[int, int] = 32):
        super().__init__()
        self.dim = dim
        self.modulation = Modulation(*((grid_size,) * 2 if isinstance(grid_size, int) else grid_size))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        scale, shift = self._maps(*x.shape[2:], x.device)
        centred = x.float() - x.float().mean(1, keepdim=True)
        gain = scale * (centred.square().mean(1, keepdim=True) + EPS).rsqrt()
        return torch.addcmul(shift, centred, gain).to(x.dtype)

    def _maps(self, height: int, width: int, device: torch.device) -> tuple[Float[Tensor, "h w"], Float[Tensor, "h w"]]:
        scale, shift = self.modulation(pixel_centres(height, width, device=device))
        return scale.view(height, width), shift.view(height, width)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The definition, with the grid's hat functions written out."""
        hats = []
        for pixels, nodes in zip(x.shape[2:], self.modulation.grid.shape[1:]):
            places = (torch.arange(pixels, device=x.device) + 0.5) / pixels * (nodes - 1)
            hats.append((1 - (places[:, None] - torch.arange(nodes, device=x.device)).abs()).clamp_min(0))
        scale, shift = torch.einsum("yi,kij,xj->kyx", hats[0], self.modulation.grid.float(), hats[1])
        centred = x.float() - x.float().mean(1, keepdim=True)
        h = centred / (centred.square().mean(1, keepdim=True) + EPS).sqrt()
        return (scale * h + shift).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}"


class TemporalModulation(nn.Module):
    """Frames (N, C, H, W) and their times (N) in [0, 1] -> the same: each channel normalised over its map, then scaled
    and shifted by numbers of its own, linear in time between `length` nodes."""

    def __init__(self, dim: int, length: int = 60):
        super().__init__()
        self.grid = nn.Parameter(torch.cat((torch.ones(dim, length), torch.zeros(dim, length))))

    def forward(self, x: Float[Tensor, "n c h w"], times: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
        return self.modulated(x, times, self.grid)

    @staticmethod
    def modulated(x: Tensor, times: Tensor, grid: Float[Tensor, "c2 length"]) -> Float[Tensor, "n c h w"]:
        """The same with numbers from elsewhere, such as quantised ones; c2 = 2 c."""
        scale, shift = interpolated(grid, times[:, None]).to(x.dtype)[..., None, None].chunk(2, 1)
        return F.instance_norm(x, eps=EPS) * scale + shift
