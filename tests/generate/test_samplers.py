"""Single steps of the samplers, worked out by hand on uneven levels; their orders are in the contract tests."""

from math import exp, log

import pytest
import torch

from opsin.generate.gaussian import GaussianMixture
from opsin.generate.samplers import DPMSolver2M, Euler, Heun, UniPC, noise_levels

LEVELS = torch.tensor([10.0, 3.0, 2.0], dtype=torch.float64)


def model(x, sigma):
    return torch.full_like(x, float(sigma)).sqrt() + 0.1 * x


def point():
    return torch.tensor([[[[7.0]]]], dtype=torch.float64)


def value(x):
    return float(x.squeeze())


def test_levels_are_even_after_the_root():
    levels = noise_levels(18)
    assert levels[0].item() == pytest.approx(80) and levels[-1].item() == pytest.approx(0.002) and len(levels) == 18
    roots = (levels ** (1 / 7)).diff()
    torch.testing.assert_close(roots, roots[:1].expand(17))


def test_euler():
    slope = (7 - value(model(point(), 10.0))) / 10
    assert value(Euler().solve(model, point(), LEVELS[:2])) == pytest.approx(7 - 7 * slope)


def test_euler_is_ddim():
    """(x - sigma eps) + sigma' eps, with eps = (x - D) / sigma."""
    clean = value(model(point(), 10.0))
    assert value(Euler().solve(model, point(), LEVELS[:2])) == pytest.approx(clean + 3 * (7 - clean) / 10)


def test_heun_averages_the_slopes():
    slope = (7 - value(model(point(), 10.0))) / 10
    guess = torch.full_like(point(), 7 - 7 * slope)
    other = (value(guess) - value(model(guess, 3.0))) / 3
    assert value(Heun().solve(model, point(), LEVELS[:2])) == pytest.approx(7 - 7 * (slope + other) / 2)


def test_dpm_solver_extrapolates_to_the_middle_of_the_next_step():
    first = model(point(), 10.0)
    x = 0.3 * point() + 0.7 * first
    second = model(x, 3.0)
    h_before, h = log(10 / 3), log(3 / 2)
    middle = second + (second - first) / h_before * h / 2
    expected = 2 / 3 * x + (1 - exp(-h)) * middle
    assert value(DPMSolver2M().solve(model, point(), LEVELS)) == pytest.approx(value(expected))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_integrates_a_denoiser_that_is_linear_in_lambda(order):
    """x' = sigma' / sigma x + sigma' * integral of e^lambda D; the corrector of any order is exact for such a D."""
    levels = torch.tensor([10.0, 6.0, 3.0, 2.0, 1.5], dtype=torch.float64)
    grid = -torch.linspace(log(10), log(1.5), 100_001, dtype=torch.float64)  # lambda = -log sigma
    exact = 1.5 * (7 / 10 + float(torch.trapezoid(grid.exp() * grid, grid)))
    solved = UniPC(order=order).solve(lambda x, sigma: torch.full_like(x, -float(sigma.log())), point(), levels)
    assert value(solved) == pytest.approx(exact, rel=1e-6)


def test_churn_raises_the_level_and_keeps_the_law():
    torch.manual_seed(0)
    denoiser = GaussianMixture(torch.zeros(1, 1, 2, 2), 0.5)
    noise = torch.randn(4000, 1, 2, 2)
    churned = Heun(churn=10.0, churn_min=0.05, churn_max=50.0)(denoiser, noise, 40)
    plain = Heun()(denoiser, noise, 40)
    assert (churned - plain).abs().mean() > 0.1
    assert churned.std().item() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(Heun(churn=10.0, churn_min=100.0)(denoiser, noise, 5), Heun()(denoiser, noise, 5))


def test_inversion_undoes_sampling():
    denoiser = GaussianMixture(torch.full((1, 1, 2, 2), 0.3), 0.5)
    noise = torch.randn(50, 1, 2, 2)
    back = Heun().invert(denoiser, Heun()(denoiser, noise, 60), 60)
    torch.testing.assert_close(back, noise, rtol=0, atol=0.05)
