"""Gabor filters against the library and the formula, their bounds, and the statistics of their responses."""

import math

import numpy as np
import pytest
import torch
from skimage.filters import gabor_kernel
from torch import nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput
from opsin.measure.cost import count_params
from opsin.ops.conv.gabor_texture import (
    ASPECT,
    BANDWIDTH,
    LEARNED,
    GaborConv,
    GaborFilters,
    co_occurrence,
    gabor_kernels,
    histogram,
    parameter_groups,
    sigma_of,
    soft_levels,
    without_mean,
)


def one(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@pytest.mark.parametrize(
    ("theta", "wavelength", "sigma", "gamma", "psi"),
    [(0.0, 4.0, 2.0, 1.0, 0.0), (0.3, 4.0, 1.6, 0.5, 0.0), (2.2, 7.5, 2.4, 0.8, 1.1), (1.2, 3.0, 2.0, 0.3, -2.0)],
)
def test_kernels_of_scikit_image(theta, wavelength, sigma, gamma, psi):
    theirs = gabor_kernel(1 / wavelength, theta, sigma_x=sigma, sigma_y=sigma / gamma, n_stds=3, offset=psi)
    theirs = np.real(theirs) * 2 * np.pi * sigma * sigma / gamma  # theirs integrates to about 1
    rows, columns = theirs.shape
    side = max(rows, columns)
    ours = gabor_kernels(*one(sigma, theta, wavelength, psi, gamma), side)[0].numpy()
    top, left = (side - rows) // 2, (side - columns) // 2
    assert np.abs(ours[top : top + rows, left : left + columns] - theirs).max() < 1e-12


def test_the_window_has_the_bandwidth_that_it_is_made_for():
    for octaves in (0.5, 1.0, 2.5):
        sigma = float(sigma_of(*one(8.0, octaves)))
        frequencies = torch.linspace(0.001, 0.5, 20000, dtype=torch.float64)
        response = torch.exp(-2 * (math.pi * sigma * (frequencies - 1 / 8)) ** 2)  # of the wave under the window
        passed = frequencies[response >= 0.5]
        assert float((passed[-1] / passed[0]).log2()) == pytest.approx(octaves, abs=0.01)


def pushed(steps: int = 30, rate: float = 100.0) -> GaborFilters:
    filters = GaborFilters(24)
    optimiser = torch.optim.SGD(filters.parameters(), rate)
    for _ in range(steps):
        optimiser.zero_grad()
        (filters() * torch.randn(24, 11, 11)).sum().backward()
        optimiser.step()
    return filters


def test_numbers_stay_in_range_and_in_their_band():
    fresh, moved = GaborFilters(24), pushed()
    assert any((getattr(fresh, n) - getattr(moved, n)).abs().max() > 5 for n in LEARNED)
    v = moved.values()
    low, high = 2 * (11 / 2) ** ((torch.arange(24) % 4) / 4), 2 * (11 / 2) ** ((torch.arange(24) % 4 + 1) / 4)
    assert (v["wavelength"] >= low - 1e-4).all() and (v["wavelength"] <= high + 1e-4).all()
    for name, (least, most) in {
        "theta": (0, math.pi), "psi": (-math.pi, math.pi), "bandwidth": BANDWIDTH, "gamma": ASPECT,
    }.items():  # fmt: skip
        assert (v[name] >= least - 1e-5).all() and (v[name] <= most + 1e-5).all(), name
    assert torch.allclose(v["sigma"], sigma_of(v["wavelength"], v["bandwidth"]))
    assert moved().isfinite().all()


def test_the_start_is_a_grid_over_bands_and_orientations():
    v = {name: value.detach() for name, value in GaborFilters(24).values().items()}
    assert torch.allclose(v["theta"].unique(), (torch.arange(6) + 0.5) * math.pi / 6)
    assert len(v["wavelength"].unique()) == 4 and 2 < v["wavelength"].min() < 3 and v["wavelength"].max() > 8
    assert torch.allclose(v["psi"].unique(), torch.tensor([0.0, math.pi / 2]), atol=1e-6)
    cells = {tuple(round(float(v[n][i]), 3) for n in ("theta", "wavelength", "psi")) for i in range(24)}
    assert len(cells) == 24


def test_brightness_does_not_reach_the_response():
    kernels = pushed(3, 1.0)()
    assert kernels.sum((1, 2)).abs().max() < 1e-5
    assert torch.allclose(kernels.flatten(1).norm(dim=1), torch.ones(24), atol=1e-5)
    raw = gabor_kernels(*(GaborFilters(24).values()[n] for n in ("sigma", "theta", "wavelength", "psi", "gamma")), 11)
    assert raw.sum((1, 2)).abs().max() > 0.1, "the formula alone passes brightness on"
    x = torch.rand(1, 1, 30, 30)
    a, b = (F.conv2d(x + c, kernels[:, None]) for c in (0.0, 0.5))
    assert torch.allclose(a, b, atol=1e-5)


def test_five_numbers_per_filter_learn_and_taps_do_not():
    op = GaborConv(8)
    assert count_params(op) == 40
    before = op.filters().detach().clone()
    op(torch.randn(2, 8, 15, 15)).square().sum().backward()
    with torch.no_grad():
        for parameter in op.parameters():
            parameter -= 0.1 * parameter.grad
    v = op.filters.values()
    formula = without_mean(gabor_kernels(v["sigma"], v["theta"], v["wavelength"], v["psi"], v["gamma"], 11))
    assert torch.allclose(op.filters(), formula) and (formula - before).abs().max() > 1e-3


def test_a_filter_finds_its_own_orientation_and_wavelength():
    filters = GaborFilters(24)
    v = {name: value.detach() for name, value in filters.values().items()}
    axis = torch.arange(41.0)
    for i in (0, 5, 18, 23):
        t = v["theta"][i]
        wave = torch.cos(2 * math.pi * (axis * t.cos() + axis[:, None] * t.sin()) / v["wavelength"][i])
        energy = F.conv2d(wave[None, None], filters()[:, None]).square().mean((0, 2, 3))
        best = int(energy.argmax())
        assert v["theta"][best] == t and v["wavelength"][best] == v["wavelength"][i]


def test_fusing_and_stride():
    op, x = GaborConv(6, kernel_size=7, stride=2), torch.randn(2, 6, 13, 10)
    folded = op.fuse()
    assert type(folded) is nn.Conv2d and torch.equal(folded(x), op(x))
    assert torch.allclose(op.reference(x), op(x), atol=1e-5) and op(x).shape == (2, 6, 7, 5)


def test_stuck_filters_go_back_to_the_grid():
    filters = GaborFilters(8)
    start = {name: p.detach().clone() for name, p in filters.named_parameters()}
    with torch.no_grad():
        filters.wavelength[2], filters.theta[5], filters.psi[6] = 20.0, -20.0, 0.3
    assert filters.stuck().nonzero().flatten().tolist() == [2, 5]
    filters.restart(filters.stuck())
    assert not filters.stuck().any() and filters.psi[6].item() == pytest.approx(0.3)
    assert torch.equal(filters.wavelength, start["wavelength"]) and torch.equal(filters.theta, start["theta"])


def test_histograms_are_numpys_where_the_bandwidth_is_small():
    maps = torch.randn(2, 3, 20, 21)
    weights, values = soft_levels(maps, 6, bandwidth=1e-3)
    shares = histogram(weights)
    for n in range(2):
        for f in range(3):
            levels = values[n, f].numpy()
            edges = np.concatenate(([-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]))
            counts, _ = np.histogram(maps[n, f].numpy(), edges)
            assert np.allclose(shares[n, f], counts / 420, atol=1e-6)
            assert levels[0] == pytest.approx(float(maps[n, f].min())) and len(levels) == 6
            assert levels[-1] == pytest.approx(float(maps[n, f].max()), abs=1e-5)


def test_histograms_sum_to_one_and_do_not_see_places():
    maps = torch.randn(2, 3, 9, 8)
    shares = histogram(soft_levels(maps)[0])
    assert torch.allclose(shares.sum(2), torch.ones(2, 3), atol=1e-6)
    for moved in (maps.roll((4, 3), (2, 3)), maps.flatten(2)[..., torch.randperm(72)].view_as(maps)):
        assert torch.allclose(histogram(soft_levels(moved)[0]), shares, atol=1e-6)
    assert histogram(soft_levels(torch.ones(1, 1, 4, 4))[0]).isfinite().all(), "a flat map"


def test_co_occurrence_counts_neighbours():
    maps = torch.tensor([[0.0, 1.0, 0.0], [2.0, 2.0, 1.0]])[None, None]
    counts = co_occurrence(soft_levels(maps, 3, bandwidth=1e-3)[0])[0, 0] * 7
    expected = torch.zeros(3, 3)
    for a, b in ((0, 1), (1, 0), (2, 2), (2, 1), (0, 2), (1, 2), (0, 1)):  # four to the right, three below
        expected[a, b] += 1
    assert torch.allclose(counts, expected, atol=1e-5)
    shares = co_occurrence(soft_levels(torch.randn(2, 3, 9, 8))[0])
    assert torch.allclose(shares.sum((2, 3)), torch.ones(2, 3), atol=1e-5)
    with pytest.raises(BadInput, match="one pixel"):
        co_occurrence(torch.rand(1, 1, 3, 1, 1))


def test_gradients_pass_the_soft_assignment():
    maps = torch.randn(1, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: histogram(soft_levels(m, 4)[0]), (maps,))


def test_a_group_of_its_own_for_the_five_numbers():
    net = opsin.create("metanet_n", mixer="gabor_texture", num_classes=3)
    rest, gabor = parameter_groups(net, 1e-3)
    assert (rest["lr"], gabor["lr"], gabor["weight_decay"]) == (1e-3, pytest.approx(1e-4), 0.0)
    assert len(gabor["params"]) == 5 * 5 and len(rest["params"]) + 25 == len(list(net.parameters()))
    assert parameter_groups(net, 1e-3, 5e-4)[1]["lr"] == 5e-4
    torch.optim.AdamW([rest, gabor])
    with pytest.raises(BadInput, match="no Gabor filters"):
        parameter_groups(nn.Linear(2, 2), 1e-3)


def test_complaints_are_sentences():
    for side in (8, 3):
        with pytest.raises(BadInput, match=f"side {side}"):
            GaborConv(4, kernel_size=side)
    with pytest.raises(BadInput, match="bands=0"):
        GaborConv(4, bands=0)
