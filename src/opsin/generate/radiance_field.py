"""A scene as a network of points: NeRF with coordinate-aware modulation, and a small differentiable volume renderer.

Lee et al. 2023, "Coordinate-Aware Modulation for Neural Fields", arXiv:2311.14993, section 3.3, on the network of NeRF
(Mildenhall et al. 2020, arXiv:2003.08934). Every hidden layer normalises its features and modulates them by grids over
the point, over the direction of view (as with mip-NeRF), or over time (dynamic scenes). Along a ray with samples i of
densities s_i, colours c_i and lengths d_i (NeRF, eq. 3):

    colour = sum_i w_i c_i,    w_i = T_i (1 - exp(-s_i d_i)),    T_i = exp(-sum_{j<i} s_j d_j)
"""

from dataclasses import dataclass
from math import pi
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput, TrainingFailed
from opsin.generate.neural_field import FieldLayer, Octaves, parameter_groups
from opsin.layers.device import device_of
from opsin.ops.normact.cam_neural_field import Modulation, TriPlane

Coordinate = Literal["space", "view", "time"]
VARIANTS = {
    "cam_nerf_space": {},
    "cam_nerf_view": dict(coordinate="view", grid=(10, 3)),
    "cam_nerf_time": dict(coordinate="time", grid=(5,)),
}


class RadianceField(nn.Module):
    """Points (n, 3), unit directions of view (n, 3) and times (n, 1) to colours (n, 3) in [0, 1] and densities (n).

    Args:
        coordinate: what the grids are over. "space": three planes of `grid[0]` nodes per side; "view": azimuth and
            elevation; "time". None for the plain network.
        grid: nodes per axis. bound: points lie in [-bound, bound]^3. width, depth: of the hidden layers; after each
            `skip`-th layer the encoded point comes in again. octaves: of points and of directions.
    Raises BadInput where the grid has not the coordinate's number of axes.
    """

    def __init__(
        self, coordinate: Coordinate | None = "space", grid: tuple[int, ...] = (512,), bound: float = 1.5,
        width: int = 256, depth: int = 8, skip: int = 4, octaves: tuple[int, int] = (10, 4), view_width: int = 128,
    ):  # fmt: skip
        super().__init__()
        axes = {"space": 1, "view": 2, "time": 1, None: len(grid)}
        if coordinate not in axes or len(grid) != axes[coordinate]:
            raise BadInput(f'grid={grid} does not fit coordinate={coordinate!r}; "space" and "time" take 1, "view" 2')
        self.coordinate, self.bound, self.skip = coordinate, bound, skip
        self.place, self.view = Octaves(3, octaves[0]), Octaves(3, octaves[1])
        self.layers, dim_in = nn.ModuleList(), self.place.features
        for i in range(depth):
            grids = None if coordinate is None else TriPlane(*grid) if coordinate == "space" else Modulation(*grid)
            self.layers.append(FieldLayer(dim_in, width, grids, coordinate is not None, F.relu))
            dim_in = width + self.place.features if self._joins(i) else width
        self.density, self.bottleneck = nn.Linear(dim_in, 1), nn.Linear(dim_in, width)
        self.colour = nn.Sequential(
            nn.Linear(width + self.view.features, view_width), nn.ReLU(), nn.Linear(view_width, 3), nn.Sigmoid()
        )

    def _joins(self, i: int) -> bool:
        return i > 0 and i % self.skip == 0

    def forward(
        self, points: Float[Tensor, "n 3"], views: Float[Tensor, "n 3"], times: Float[Tensor, "n 1"] | None = None
    ) -> tuple[Float[Tensor, "n 3"], Float[Tensor, " n"]]:
        encoded, places = self.place(points), self._coordinate(points, views, times)
        h = encoded
        for i, layer in enumerate(self.layers):
            h = layer(h, places)
            h = torch.cat((h, encoded), 1) if self._joins(i) else h
        colour = self.colour(torch.cat((self.bottleneck(h), self.view(views)), 1))
        return colour, F.softplus(self.density(h)[:, 0] - 1)

    def _coordinate(self, points: Tensor, views: Tensor, times: Tensor | None) -> Float[Tensor, "n d"]:
        """Where the grids are read, in [0, 1]."""
        if self.coordinate == "view":
            azimuth = torch.atan2(views[:, 1], views[:, 0]) / (2 * pi) + 0.5
            return torch.stack((azimuth, (views[:, 2].clamp(-1, 1) + 1) / 2), 1)
        if self.coordinate == "time":
            if times is None:
                raise BadInput("this field is modulated by time; pass times of shape (n, 1) in [0, 1]")
            return times
        return points / (2 * self.bound) + 0.5


@dataclass
class Rays:
    """Origins and unit directions (n, 3), and times (n, 1) of a dynamic scene."""

    origins: Float[Tensor, "n 3"]
    directions: Float[Tensor, "n 3"]
    times: Float[Tensor, "n 1"] | None = None

    def __getitem__(self, rows: Tensor) -> "Rays":
        return Rays(self.origins[rows], self.directions[rows], None if self.times is None else self.times[rows])


def camera_rays(pose: Float[Tensor, "3 4"], height: int, width: int, focal: float) -> Rays:
    """Of every pixel's centre, row by row. pose: camera to world; the camera looks along its negative z axis, y is up.

    focal: in pixels.
    """
    rows, columns = (torch.arange(side, device=pose.device) + 0.5 for side in (height, width))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    towards = torch.stack(((columns - width / 2) / focal, (height / 2 - rows) / focal, -torch.ones_like(rows)), -1)
    directions = F.normalize(towards.flatten(0, 1) @ pose[:, :3].T, dim=1)
    return Rays(pose[:, 3].expand_as(directions), directions)


def composite(
    colours: Float[Tensor, "n s 3"], densities: Float[Tensor, "n s"], lengths: Float[Tensor, "n s"]
) -> tuple[Float[Tensor, "n 3"], Float[Tensor, "n s"]]:
    """The colour of each ray, and the weights w of its samples; 1 - sum(w) is what passes through."""
    optical = densities * lengths
    passed = torch.exp(-(optical.cumsum(1) - optical))
    weights = passed * -torch.expm1(-optical)
    return (weights[..., None] * colours).sum(1), weights


def render(
    field: RadianceField, rays: Rays, near: float, far: float, samples: int = 64, jitter: bool = False,
    background: float = 1.0,
) -> Float[Tensor, "n 3"]:  # fmt: skip
    """Colours of rays between two distances, on a plain background. jitter: one random place per stratum, to train."""
    count, device = len(rays.origins), rays.origins.device
    within = torch.rand(count, samples, device=device) if jitter else torch.full((count, samples), 0.5, device=device)
    edges = near + (far - near) * torch.arange(samples + 1, device=device) / samples
    places = edges[:-1] + (edges[1:] - edges[:-1]) * within
    lengths = torch.diff(places, append=torch.full((count, 1), far, device=device))
    points = rays.origins[:, None] + places[..., None] * rays.directions[:, None]
    views = rays.directions[:, None].expand_as(points).flatten(0, 1)
    times = None if rays.times is None else rays.times.repeat_interleave(samples, 0)
    colours, densities = field(points.flatten(0, 1), views, times)
    colour, weights = composite(colours.view(count, samples, 3), densities.view(count, samples), lengths)
    return colour + background * (1 - weights.sum(1, keepdim=True))


@torch.no_grad()
def render_image(
    field: RadianceField, pose: Float[Tensor, "3 4"], size: tuple[int, int], focal: float, near: float, far: float,
    samples: int = 64, time: float | None = None, rays_at_once: int = 1024,
) -> Float[Tensor, "3 h w"]:  # fmt: skip
    """A picture of the scene from a pose, on the field's device."""
    device = device_of(field)
    rays = camera_rays(pose.to(device), *size, focal)
    if time is not None:
        rays.times = torch.full((len(rays.origins), 1), time, device=device)
    parts = torch.arange(len(rays.origins), device=device).split(rays_at_once)
    return torch.cat([render(field, rays[rows], near, far, samples) for rows in parts]).T.unflatten(1, size)


def fit_scene(
    field: RadianceField, images: Float[Tensor, "n 3 h w"], poses: Float[Tensor, "n 3 4"], focal: float, *,
    near: float, far: float, times: Float[Tensor, " n"] | None = None, steps: int = 20000, lr: float = 5e-4,
    batch: int = 1024, samples: int = 64, seed: int = 0,
) -> RadianceField:  # fmt: skip
    """Trains on pictures in [0, 1] with known poses: random rays of all, mean square error, Adam, a cosine cycle.

    It trains where the field is. Raises TrainingFailed for a loss that is not a number.
    """
    height, width = images.shape[2:]
    device = device_of(field)
    views = [camera_rays(pose, height, width, focal) for pose in poses.to(device)]
    rays = Rays(torch.cat([v.origins for v in views]), torch.cat([v.directions for v in views]))
    if times is not None:
        rays.times = times.to(device).repeat_interleave(height * width)[:, None]
    target = images.to(device).permute(0, 2, 3, 1).reshape(-1, 3)
    optimiser = torch.optim.Adam([group for group in parameter_groups(field, lr) if group["params"]])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    torch.manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(target), (batch,), device=device)
        loss = F.mse_loss(render(field, rays[rows], near, far, samples, jitter=True), target[rows])
        if not loss.isfinite():
            raise TrainingFailed(f"the loss of the scene is {loss.item()} at step {step}; take a smaller lr than {lr}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    return field
