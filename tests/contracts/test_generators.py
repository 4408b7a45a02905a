"""What every denoiser, sampler and trick must pass, and members that are broken on purpose, which must not."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import nn

import opsin
from opsin.catalog import all_cards, entry, find
from opsin.generate import Denoiser, Sampler, Trick
from opsin.generate.edm import score
from opsin.generate.gaussian import GaussianMixture
from opsin.generate.samplers import SAMPLERS, Euler, Heun, UniPC, convergence_order

GENERATORS = [card.key for card in all_cards().values() if card.kind == "generator"]
TRICKS = [card.key for card in all_cards().values() if card.kind == "trick"]
SIZED = [(c.key, v.name, v.params_m) for c in all_cards().values() if c.kind == "generator"
         for v in c.variants.values() if v.params_m]  # fmt: skip
ORDERS = {"euler": 1, "heun": 2, "dpm2m": 2, "unipc": 3}  # unipc: order 2, and one more from its corrector


def smallest(key: str) -> nn.Module:
    """The variant of the smallest images, all of whose weights are random (fresh ones add nothing to the input)."""
    variants = all_cards()[key].variants.values()
    denoiser = opsin.create(min(variants, key=lambda v: v.input or 0).name)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.1)
    return denoiser.eval()


def images_for(denoiser, n=4):
    return torch.randn(n, *denoiser.sample_shape)


# --- denoisers ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def check_samples_are_independent(denoiser):
    x, sigma = images_for(denoiser), torch.tensor([0.01, 0.3, 2.0, 40.0])
    together = denoiser(x, sigma)
    assert together.shape == x.shape and together.dtype == x.dtype
    alone = torch.cat([denoiser(x[i : i + 1], sigma[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_clean_images_pass(denoiser):
    """Without noise there is nothing to remove: D(x; sigma -> 0) = x."""
    x = 0.5 * images_for(denoiser)
    torch.testing.assert_close(denoiser(x, torch.full((4,), 1e-5)), x, rtol=0, atol=1e-3)


@torch.no_grad()
def check_noise_is_bounded(denoiser):
    """At sigma = 10^4 the answer is of the data's size, not of the noise's."""
    assert denoiser(1e4 * images_for(denoiser), torch.full((4,), 1e4)).abs().mean() < 20


def check_gradients_reach_every_parameter(denoiser):
    denoiser.train().requires_grad_(True)
    labels = torch.arange(4) if denoiser.num_classes else None
    denoiser(images_for(denoiser), torch.tensor([0.1, 0.5, 1.0, 5.0]), labels).square().mean().backward()
    idle = [name for name, p in denoiser.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert not idle


@pytest.mark.parametrize("key", GENERATORS)
@pytest.mark.parametrize(
    "check",
    [check_samples_are_independent, check_clean_images_pass, check_noise_is_bounded,
     check_gradients_reach_every_parameter],
)  # fmt: skip
def test_denoisers(key, check):
    denoiser = smallest(key)
    assert isinstance(denoiser, Denoiser)
    check(denoiser)


@pytest.mark.parametrize("key", GENERATORS)
def test_denoisers_in_bfloat16_exported_and_reloaded(key, tmp_path):
    denoiser = smallest(key)
    x, sigma = images_for(denoiser), torch.tensor([0.1, 0.5, 1.0, 5.0])
    with torch.no_grad():
        expected = denoiser(x, sigma)
        exported = torch.export.export(denoiser, (x, sigma)).module()(x, sigma)
        torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
        torch.save(denoiser.state_dict(), tmp_path / "weights.pt")
        other = smallest(key)
        other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        assert torch.equal(other(x, sigma), expected)
        low = denoiser.bfloat16()(x, sigma)
        assert low.dtype == torch.float32 and (low - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize(("key", "name", "millions"), SIZED)
def test_published_sizes(key, name, millions):
    with torch.device("meta"):
        network = opsin.create(name)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)


class MixesTheBatch(nn.Module):
    """Broken: normalises over the batch."""

    sample_shape, num_classes = (1, 4, 4), 0

    def forward(self, x, sigma, cond=None):
        return (x - x.mean(0)) / (1 + x.std(0, correction=0))


class OneLevelForAll(nn.Module):
    """Broken: takes the first sample's noise level for all."""

    sample_shape, num_classes = (1, 4, 4), 0

    def forward(self, x, sigma, cond=None):
        return x / (1 + sigma[0] ** 2)


class WithoutPreconditioning(nn.Module):
    """Broken: predicts noise, whatever the level."""

    sample_shape, num_classes = (1, 4, 4), 0

    def __init__(self):
        super().__init__()
        self.conv, self.unused = nn.Conv2d(1, 1, 3, padding=1), nn.Parameter(torch.ones(1))

    def forward(self, x, sigma, cond=None):
        return self.conv(x)


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (MixesTheBatch, check_samples_are_independent),
        (OneLevelForAll, check_samples_are_independent),
        (WithoutPreconditioning, check_clean_images_pass),
        (WithoutPreconditioning, check_noise_is_bounded),
        (WithoutPreconditioning, check_gradients_reach_every_parameter),
    ],
)
def test_broken_denoisers_are_caught(broken, check):
    with pytest.raises(AssertionError):
        check(broken())


# --- samplers -------------------------------------------------------------------------------------------------------


def gaussian(std=0.5):
    return GaussianMixture(torch.linspace(-1, 1, 12).reshape(1, 3, 2, 2).double(), std)


def check_order(sampler, order):
    denoiser = gaussian()
    x = 2 * torch.randn(8, 3, 2, 2, dtype=torch.float64)
    measured = convergence_order(sampler, denoiser, lambda x: denoiser.flow(x, 2.0, 0.1), x, (40, 80))
    assert abs(measured - order) < 0.3, measured


def check_gaussian_is_reproduced(sampler, steps=40):
    """Every sample ends where the exact ODE takes its noise, so mean and deviation are those of the data."""
    denoiser, noise = gaussian(), torch.randn(2000, 3, 2, 2)
    samples = sampler(denoiser, noise, steps)
    assert samples.dtype == noise.dtype
    exact = denoiser.flow(noise * 80, 80.0, 0.0)
    assert (samples - exact).abs().max() < 0.15
    torch.testing.assert_close(samples.mean(0), denoiser.means[0].float(), rtol=0, atol=0.06)
    torch.testing.assert_close(samples.std(0), torch.full((3, 2, 2), 0.5), rtol=0.1, atol=0)


def check_modes_are_in_proportion(sampler):
    means = torch.stack((torch.full((1, 1, 2), -1.0), torch.full((1, 1, 2), 1.0)))
    denoiser = GaussianMixture(means, 0.1, torch.tensor([0.25, 0.75]))
    samples = sampler(denoiser, torch.randn(4000, 1, 1, 2), 30).mean((1, 2, 3))
    assert abs(float((samples > 0).float().mean()) - 0.75) < 0.03
    assert float((samples.abs() - 1).abs().mean()) < 0.15


def check_evaluations(sampler):
    calls = []

    def denoiser(x, sigma, cond=None):
        calls.append(float(sigma[0]))
        return x / (1 + sigma[:, None, None, None] ** 2)

    sampler(denoiser, torch.randn(2, 1, 2, 2), 7)
    assert len(calls) == sampler.nfe(7)
    assert max(calls) == pytest.approx(80) and min(calls) == pytest.approx(0.002)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name):
    sampler = SAMPLERS[name]()
    assert isinstance(sampler, Sampler)
    check_order(SAMPLERS[name](sigma_min=0.1, sigma_max=2.0, rho=1.0), ORDERS[name])
    check_gaussian_is_reproduced(sampler, steps=160 if name == "euler" else 40)
    check_modes_are_in_proportion(sampler)
    check_evaluations(sampler)


def test_unipc_gains_an_order_with_each_level_it_keeps():
    exact, x = gaussian(), 80 * torch.randn(8, 3, 2, 2, dtype=torch.float64)
    for order in (1, 2, 3):
        measured = convergence_order(UniPC(order=order), exact, lambda x: exact.flow(x, 80.0, 0.002), x, (40, 80))
        assert measured == pytest.approx(order + 1, abs=0.2)


class ForgetsToScale(Heun):
    """Broken: starts from unit noise at level sigma_max."""

    def __call__(self, denoiser, noise, steps, cond=None):
        return super().__call__(denoiser, noise / self.sigma_max, steps, cond)


class HalfCorrected(Heun):
    """Broken: evaluates the slope at the end of the step but barely uses it."""

    def solve(self, model, x, levels):
        for here, there in pairwise(levels):
            slope = (x - model(x, here)) / here
            guess = x + (there - here) * slope
            x = x + (there - here) * (0.9 * slope + 0.1 * (guess - model(guess, there)) / there)
        return x


class StopsEarly(Euler):
    """Broken: leaves the noise of the last level but one in the image."""

    def solve(self, model, x, levels):
        return super().solve(model, x, levels[:-8])


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (ForgetsToScale(), check_gaussian_is_reproduced),
        (ForgetsToScale(), check_modes_are_in_proportion),
        (HalfCorrected(sigma_min=0.1, sigma_max=2.0, rho=1.0), lambda s: check_order(s, 2)),
        (StopsEarly(), check_modes_are_in_proportion),
        (UniPC(), lambda s: check_order(s, 2)),
        (type("Miscounted", (Euler,), {"nfe": lambda self, steps: 2 * steps})(), check_evaluations),
    ],
)
def test_broken_samplers_are_caught(broken, check):
    with pytest.raises(AssertionError):
        check(broken)


def test_the_denoiser_gives_the_score():
    mixture = GaussianMixture(torch.randn(3, 2, 2, 2).double(), 0.4, torch.tensor([0.2, 0.3, 0.5]))
    x = torch.randn(6, 2, 2, 2).double().requires_grad_()
    sigma = torch.tensor([0.05, 0.1, 0.5, 1.0, 3.0, 20.0]).double()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(score(mixture, x, sigma), gradient)


# --- tricks ---------------------------------------------------------------------------------------------------------


def fingerprint(model):
    """Everything that a trick might leave behind: outputs, weights, hooks, attributes."""
    with torch.no_grad():
        torch.manual_seed(1)
        x = torch.randn(3, *model.sample_shape)
        output = model(x, torch.tensor([0.05, 0.5, 5.0]))
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m))) for m in model.modules()]
    return output, {name: t.clone() for name, t in model.state_dict().items()}, hooks


def assert_same(before, after):
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1]) and before[2] == after[2]


def check_undone(trick, model):
    before = fingerprint(model)
    with trick.apply(model) as patched:
        fingerprint(patched)
    assert_same(before, fingerprint(model))


def check_undone_after_an_error(trick, model):
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), trick.apply(model):
        1 / 0
    assert_same(before, fingerprint(model))


def check_it_acts(trick, model):
    before = fingerprint(model)[0]
    with trick.apply(model) as patched:
        assert (fingerprint(patched)[0] - before).abs().max() > 1e-4


def check_off_is_identical(trick, model):
    before = fingerprint(model)[0]
    with trick.apply(model) as patched:
        assert torch.equal(fingerprint(patched)[0], before)


@pytest.mark.parametrize("key", TRICKS)
@pytest.mark.parametrize("check", [check_undone, check_undone_after_an_error, check_it_acts])
def test_tricks(key, check):
    trick = opsin.create(key)
    assert isinstance(trick, Trick)
    check(trick, smallest("edm"))


@pytest.mark.parametrize("key", [key for key in TRICKS if "off" in all_cards()[key].facts])
def test_tricks_that_are_off_change_nothing(key):
    check_off_is_identical(opsin.create(key, **find(key)[0].facts["off"]), smallest("edm"))


class LeavesAHook:
    @contextmanager
    def apply(self, model):
        model.register_forward_hook(lambda module, inputs, output: 1.01 * output)
        yield model


class ScalesWeightsAndBack:
    @contextmanager
    def apply(self, model):
        for parameter in model.parameters():
            parameter.data *= 0.7
        yield model
        for parameter in model.parameters():
            parameter.data /= 0.7


class DoesNothing:
    @contextmanager
    def apply(self, model):
        yield model


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (LeavesAHook(), check_undone),
        (ScalesWeightsAndBack(), check_undone),
        (ScalesWeightsAndBack(), check_undone_after_an_error),
        (DoesNothing(), check_it_acts),
        (LeavesAHook(), check_off_is_identical),
    ],
)
def test_broken_tricks_are_caught(broken, check):
    with pytest.raises(AssertionError):
        check(broken, smallest("edm"))


def test_entries_are_what_their_kind_says():
    assert all(issubclass(entry(all_cards()[key]), nn.Module) for key in GENERATORS)
    assert all(hasattr(entry(all_cards()[key]), "apply") for key in TRICKS)
