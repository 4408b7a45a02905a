"""The wave solver: exact solutions, energy, stability, media and pulses."""

import math

import pytest
import torch
from torch import Tensor

from opsin.errors import BadInput
from opsin.science.wave import (
    energy,
    laplacian,
    random_layers,
    random_pulses,
    solve,
    stable_step,
    trajectories,
)


def plane_wave(size: int, turns: tuple[int, int], times: Tensor, omega: float) -> Tensor:
    axis = 2 * math.pi * torch.arange(size, dtype=torch.float64) / size
    phase = turns[0] * axis + turns[1] * axis[:, None]
    return torch.cos(phase - omega * times[:, None, None])


@pytest.mark.parametrize("turns", [(1, 0), (2, 3), (-1, 4)])
def test_plane_waves_run_at_the_speed_of_the_dispersion_relation(turns):
    """sin(w dt / 2) = (c dt / dx) sqrt(sin(kx dx / 2)^2 + sin(ky dx / 2)^2) is exact for leap-frog steps."""
    size, speed, dt, dx = 24, 0.8, 0.5, 1.3
    waves = [math.pi * t / size for t in turns]  # k dx / 2
    omega = 2 / dt * math.asin(speed * dt / dx * math.hypot(*map(math.sin, waves)))
    exact = plane_wave(size, turns, dt * torch.arange(41).double(), omega)
    before = plane_wave(size, turns, torch.tensor([-dt]).double(), omega)[0]
    velocity = (exact[1] - before)[None] / (2 * dt)
    fields = solve(exact[:1], torch.full((1, size, size), speed, dtype=torch.float64), dt, 40, dx=dx, velocity=velocity,
                   boundary="periodic")  # fmt: skip
    assert torch.allclose(fields[0], exact, atol=1e-9)


def dalembert_error(cells: int) -> float:
    """Largest error of u(x, t) = (f(x - c t) + f(x + c t)) / 2 for a bump on a circle of length 1."""
    dx, speed, time = 1 / cells, 0.7, 0.4
    steps = 4 * cells // 10
    x = torch.arange(cells, dtype=torch.float64) * dx

    def bump(x: Tensor) -> Tensor:
        return torch.exp(-((x - x.floor() - 0.5) ** 2) / (2 * 0.06**2))

    start = bump(x).expand(1, 8, cells).contiguous()
    fields = solve(start, torch.full_like(start, speed), time / steps, steps, dx=dx, boundary="periodic")
    exact = 0.5 * (bump(x - speed * time) + bump(x + speed * time))
    return float((fields[0, -1] - exact).abs().max())


def test_dalemberts_solution_is_approached_with_second_order():
    coarse, fine = dalembert_error(80), dalembert_error(160)
    assert fine < 0.01 and 3.5 < coarse / fine < 4.5


@pytest.mark.parametrize("boundary", ["fixed", "periodic"])
def test_energy_is_kept(boundary):
    draw = torch.Generator().manual_seed(0)
    speed, start = random_layers(3, 20, draw).double(), random_pulses(3, 20, draw).double()
    dt = 0.9 * stable_step(speed)
    fields = solve(start, speed, dt, 200, boundary=boundary)
    values = torch.stack([energy(fields[:, i], fields[:, i + 1], speed, dt, 1.0, boundary) for i in range(200)])
    assert (values > 0).all() and (values / values[0] - 1).abs().max() < 1e-11
    wrong = torch.stack([energy(fields[:, i], fields[:, i + 1], speed + 0.1, dt, 1.0, boundary) for i in (0, 199)])
    assert (wrong[1] / wrong[0] - 1).abs().max() > 1e-4


def test_steps_beyond_the_limit_are_refused_and_would_explode():
    start, speed = torch.randn(1, 12, 12), torch.ones(1, 12, 12)
    assert stable_step(speed) == pytest.approx(1 / math.sqrt(2))
    with pytest.raises(BadInput, match=r"dt=0.75 is not stable.*0.7071"):
        solve(start, speed, 0.75, 10)
    assert solve(start, speed, stable_step(speed), 300).abs().max() < 100
    before, u = start, start
    for _ in range(100):
        before, u = u, 2 * u - before + 0.75**2 * laplacian(u, boundary="periodic")
    assert u.abs().max() > 1e6
    with pytest.raises(BadInput, match="differ in shape"):
        solve(start, speed[:, 1:], 0.1, 10)


def test_a_source_accelerates_the_field():
    still, force = torch.zeros(2, 6, 6, dtype=torch.float64), torch.rand(2, 1, 1, 1, dtype=torch.float64)
    source = force.expand(2, 10, 6, 6)
    fields = solve(still, still + 1, 0.5, 10, source=source, boundary="periodic")
    times = 0.5 * torch.arange(11)[:, None, None]
    assert torch.allclose(fields, (0.5 * force * times**2).expand_as(fields)), "u = f t^2 / 2 where nothing varies"
    spot = torch.zeros(2, 10, 6, 6, dtype=torch.float64)
    spot[:, 3, 2, 2] = 4.0
    fields = solve(still, still + 1, 0.5, 10, source=spot)
    assert not fields[:, :4].any() and (fields[:, 4, 2, 2] == 1).all(), "a kick of dt^2 f at its step"
    with pytest.raises(BadInput, match="each of the 10 steps"):
        solve(still, still + 1, 0.5, 10, source=source[:, 1:])


def test_laplacian():
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    inside = laplacian((x**2 + 3 * y**2)[None], dx=0.5)[0, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.full_like(inside, 8 / 0.25))
    ones = torch.ones(1, 4, 4)
    assert (laplacian(ones, boundary="periodic") == 0).all() and laplacian(ones)[0, 0, 0] == -2


def test_waves_are_slower_in_the_slower_half():
    speed = torch.full((1, 40, 40), 1.0)
    speed[:, :, :20] = 0.5
    start = torch.zeros(1, 40, 40)
    start[0, 20, 20] = 1.0
    field = solve(start, speed, 0.5, 24)[0, -1].abs()
    columns = (field.amax(0) > 1e-2).nonzero().flatten()
    left, right = 20 - int(columns.min()), int(columns.max()) - 20
    assert 4 <= left <= 8 and 10 <= right <= 14


def test_trajectories_are_those_of_the_solver_and_repeatable():
    data = trajectories(5, size=24, snapshots=6, every=4, seed=3)
    assert data.fields.shape == (5, 6, 24, 24) and len(data) == 5
    dt = 0.5 / math.sqrt(2)
    steps = solve(data.fields[:, 0], data.speed, dt, 20)
    assert torch.equal(data.fields, steps[:, ::4])
    assert torch.equal(trajectories(5, size=24, snapshots=6, seed=3).fields, data.fields)
    assert not torch.equal(trajectories(5, size=24, snapshots=6, seed=4).fields, data.fields)
    assert all(len(s.unique()) == 2 for s in data.speed) and data.speed.min() >= 0.5 and data.speed.max() <= 1
    assert (data.fields[:, 0].abs().amax((1, 2)) > 0.2).all()
