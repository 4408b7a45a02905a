"""Diagnostics against closed forms."""

import pytest
import torch

from opsin.generate.diagnostics import denoising_loss, frechet_distance, inversion_mmd, mmd, skip_norm_ratios
from opsin.generate.edm import EDM
from opsin.generate.gaussian import GaussianMixture


def test_the_exact_denoiser_leaves_the_posterior_variance():
    denoiser = GaussianMixture(torch.zeros(1, 1, 4, 4), 0.5)
    images = denoiser.draw(4000)
    losses = denoising_loss(denoiser, images, (0.1, 0.5, 3.0), batch=1500)
    for sigma, loss in losses.items():
        assert loss == pytest.approx(0.25 * sigma**2 / (0.25 + sigma**2), rel=0.03)
    doubled = denoising_loss(denoiser, images, (0.5,), features=lambda x: 2 * x)
    assert doubled[0.5] == pytest.approx(4 * denoising_loss(denoiser, images, (0.5,))[0.5])


def test_conditions_follow_their_batch():
    def denoiser(x, sigma, cond):
        return cond[:, None, None, None].float().expand_as(x)

    labels = torch.arange(10)
    images = labels[:, None, None, None].float().expand(10, 1, 2, 2)
    assert denoising_loss(denoiser, images, (1.0,), cond=labels, batch=4) == {1.0: 0.0}


def test_inversion_gives_unit_noise_only_for_the_right_denoiser():
    exact, wrong = GaussianMixture(torch.zeros(1, 1, 3, 3), 0.5), GaussianMixture(torch.zeros(1, 1, 3, 3), 0.3)
    images = exact.draw(600)
    assert abs(inversion_mmd(exact, images, steps=40)) < 0.01
    assert inversion_mmd(wrong, images, steps=40) > 0.05


def test_mmd():
    x = torch.randn(400, 5)
    assert abs(mmd(x, torch.randn(400, 5))) < 0.01
    assert mmd(x, torch.randn(400, 5) + 0.5) > 0.03
    assert mmd(x, 1.5 * torch.randn(400, 5)) > 0.03


def test_frechet_distance_of_gaussians():
    x = torch.randn(20_000, 3)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    shifted = 2 * torch.randn(20_000, 3) + torch.tensor([1.0, 0.0, 2.0])
    assert frechet_distance(x, shifted) == pytest.approx(5 + 3 * (2 - 1) ** 2, rel=0.03)
    mixing = torch.randn(3, 3)
    a, b = torch.cov((x @ mixing).T).double(), torch.cov(shifted.T).double()
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ values.sqrt().diag() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()
    means = ((x @ mixing).mean(0) - shifted.mean(0)).square().sum()
    expected = float(means + a.trace() + b.trace() - 2 * cross)
    assert frechet_distance(x @ mixing, shifted) == pytest.approx(expected, rel=1e-4)


def test_skip_norm_ratios():
    model = EDM(8, 1, channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(), head_dim=8).eval()
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    seen = []
    handles = [
        p.register_forward_hook(lambda m, i, o: seen.append(float(i[1].norm() / i[0].norm())))
        for p in model.skip_points()
    ]
    ratios = skip_norm_ratios(model, x, sigma)
    assert ratios == pytest.approx(seen) and len(ratios) == 4
    for handle in handles:
        handle.remove()
    assert not any(p._forward_pre_hooks for p in model.skip_points())
