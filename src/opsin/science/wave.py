"""The wave equation on a grid, as data for surrogates: pulses that run through layered media.

    u_tt = c(x, y)^2 (u_xx + u_yy) + f(t, x, y)

by leap-frog steps with the five-point Laplacian L,

    u^{t+1} = 2 u^t - u^{t-1} + (c dt)^2 L u^t + dt^2 f^t

stable for c dt sqrt(2) / dx <= 1 (Courant, Friedrichs and Lewy), which without a source f keep one quadratic form of
two successive fields exactly, the discrete energy

    E = 1/2 sum ((u^{t+1} - u^t) / (c dt))^2 - 1/2 sum u^{t+1} L u^t.

All fields of a batch step together. Lengths are in grid cells (dx = 1) unless said otherwise.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional as F

from opsin.errors import BadInput

Boundary = Literal["fixed", "periodic"]
Field = Float[Tensor, "n h w"]


def laplacian(u: Field, dx: float = 1.0, boundary: Boundary = "fixed") -> Field:
    """Five-point Laplacian; outside is zero ("fixed", so that waves reflect) or the other side ("periodic")."""
    mode = {"fixed": "constant", "periodic": "circular"}[boundary]
    p = F.pad(u[:, None], (1, 1, 1, 1), mode=mode)[:, 0]
    around = p[:, 1:-1, 2:] + p[:, 1:-1, :-2] + p[:, 2:, 1:-1] + p[:, :-2, 1:-1]
    return (around - 4 * u) / dx**2


def stable_step(speed: Field, dx: float = 1.0) -> float:
    """The longest stable time step for these speeds."""
    return dx / (math.sqrt(2) * float(speed.max()))


def energy(
    before: Field, after: Field, speed: Field, dt: float, dx: float = 1.0, boundary: Boundary = "fixed"
) -> Tensor:
    """E of two successive fields, one number per sample; leap-frog steps keep it to rounding."""
    motion = ((after - before) / (speed * dt)).square().sum((1, 2))
    return 0.5 * (motion - (after * laplacian(before, dx, boundary)).sum((1, 2)))


def solve(
    start: Field, speed: Field, dt: float, steps: int, *, dx: float = 1.0, velocity: Field | None = None,
    source: Float[Tensor, "n s h w"] | None = None, boundary: Boundary = "fixed", every: int = 1,
) -> Float[Tensor, "n t h w"]:  # fmt: skip
    """The fields at steps 0, every, 2 every, ... up to `steps`.

    velocity: u_t at the start; source: f at the steps 0 to `steps` - 1; both zero by default.
    Raises BadInput: a time step that is not stable, or fields that do not fit each other.
    """
    if start.shape != speed.shape:
        raise BadInput(f"the start {tuple(start.shape)} and the speeds {tuple(speed.shape)} differ in shape")
    if source is not None and source.shape != (len(start), steps, *start.shape[1:]):
        raise BadInput(f"the source {tuple(source.shape)} needs one field for each of the {steps} steps")
    if dt > stable_step(speed, dx):
        raise BadInput(f"dt={dt:.4g} is not stable for these speeds; take at most {stable_step(speed, dx):.4g}")

    def push(u: Field, step: int) -> Field:
        """dt^2 u_tt of a field."""
        pull = (speed * dt) ** 2 * laplacian(u, dx, boundary)
        return pull if source is None else pull + dt**2 * source[:, step]

    before, u = start, start + 0.5 * push(start, 0)
    if velocity is not None:
        u = u + dt * velocity
    kept = [start]
    for step in range(1, steps + 1):
        if step > 1:
            before, u = u, 2 * u - before + push(u, step - 1)
        if step % every == 0:
            kept.append(u)
    return torch.stack(kept, 1)


def random_layers(count: int, size: int, draw: Generator, speeds: tuple[float, float] = (0.5, 1.0)) -> Field:
    """Two-layer media: a straight interface at a random angle and place, a random speed on each side of it."""
    angle = 2 * math.pi * torch.rand(count, 1, 1, generator=draw)
    offset = size * (torch.rand(count, 1, 1, generator=draw) - 0.5) / 2
    values = speeds[0] + (speeds[1] - speeds[0]) * torch.rand(count, 2, 1, 1, generator=draw)
    axis = torch.arange(size) - (size - 1) / 2
    side = axis * angle.cos() + axis[:, None] * angle.sin() > offset
    return torch.where(side, values[:, 0], values[:, 1])


def random_pulses(count: int, size: int, draw: Generator, widths: tuple[float, float] = (2.0, 4.0)) -> Field:
    """One to three Gaussian bumps of random places, widths (standard deviations, in cells) and signs, per sample."""
    places = size * (0.15 + 0.7 * torch.rand(count, 3, 2, 1, 1, generator=draw))
    width = widths[0] + (widths[1] - widths[0]) * torch.rand(count, 3, 1, 1, generator=draw)
    height = (0.5 + 0.5 * torch.rand(count, 3, generator=draw)) * torch.randn(count, 3, generator=draw).sign()
    height[:, 1:] *= torch.rand(count, 2, generator=draw) < 0.5
    axis = torch.arange(size)
    distance = (axis - places[:, :, 0]) ** 2 + (axis[:, None] - places[:, :, 1]) ** 2
    return (height[:, :, None, None] * torch.exp(-distance / (2 * width**2))).sum(1)


@dataclass(frozen=True)
class Waves:
    """Trajectories: snapshots of the field, and the speed map (cells per unit of time) of each."""

    fields: Float[Tensor, "n t h w"]
    speed: Float[Tensor, "n h w"]

    def __len__(self) -> int:
        return len(self.fields)


def trajectories(count: int, *, size: int = 64, snapshots: int = 22, every: int = 4, seed: int = 0) -> Waves:
    """Random pulses at rest in random two-layer media with fixed edges; every fourth step at half the stable one.

    Raises BadInput through `solve`.
    """
    draw = Generator().manual_seed(seed)
    speed, start = random_layers(count, size, draw), random_pulses(count, size, draw)
    dt = 0.5 * stable_step(torch.ones(1, 1, 1))  # the fastest medium that there is, so that all have one time step
    return Waves(solve(start, speed, dt, (snapshots - 1) * every, every=every), speed)
