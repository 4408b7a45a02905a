"""Scattering: frames against closed forms and Kymatio, paths against the definition, and the theorems."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.catalog import card_of
from opsin.errors import BadInput, UnknownName
from opsin.measure.memory import peak_memory
from opsin.ops.spectral.frames import (
    FRAMES,
    Haar,
    LearnedKernels,
    Morlet,
    RandomKernels,
    WeylHeisenberg,
    frame_bounds,
    littlewood_paley,
    morlet_bank,
)
from opsin.ops.spectral.scattering_bounds import (
    admissibility,
    band_limited,
    decay_constants,
    deform,
    deformation_bound,
    expansion,
    norms,
    translation_bounds,
)
from opsin.ops.spectral.scattering_theory import NONLINEARITIES, POOLINGS, FrameScattering

# Kymatio 0.3.0: filter_bank(12, 10, J=2, L=4), entries of the first, the sixth and the low-pass filter; and
# Scattering2D(J=2, L=4, pre_pad=True) of sin(0.37 i) on 16x16 pixels, the inner 2x2 positions' first one.
KYMATIO_PSI_0, KYMATIO_PSI_5 = [0.14235, 0.530333, 0.044969, 0.057537], [-0.0, 0.060783, 0.107802, -0.000002]
KYMATIO_PHI = [1.000029, 0.424767, 0.005631, 0.424767]
KYMATIO = [
    0.019183, 0.001937, 0.065648, 0.107802, 0.066877, 0.005139, 0.134896, 0.246733, 0.137504, 0.001113, 0.001765,
    0.001317, 0.001425, 0.001408, 0.005683, 0.012492, 0.004426, 0.001357, 0.006872, 0.018431, 0.006919, 0.001001,
    0.004425, 0.012549, 0.005251,
]  # fmt: skip


def image(side: int = 16, n: int = 3) -> Tensor:
    return torch.rand(n, 1, side, side, dtype=torch.float64)


def test_morlet_filters_are_kymatios():
    bank = morlet_bank(2, 4, 12, 10)
    assert np.abs(bank.imag).max() < 1e-12
    assert bank[0].real[[0, 1, 3, 9], [1, 2, 8, 4]] == pytest.approx(KYMATIO_PSI_0, abs=2e-5)
    assert bank[5].real[[0, 1, 3, 9], [1, 2, 8, 4]] == pytest.approx(KYMATIO_PSI_5, abs=2e-5)
    assert bank[-1].real[[0, 1, 3, 11], [0, 1, 2, 9]] == pytest.approx(KYMATIO_PHI, abs=5e-5)


def test_wavelet_modulus_network_is_kymatios():
    """Up to the scale of each order, and to the aliasing of its sub-sampled intermediate maps."""
    x = torch.sin(0.37 * torch.arange(256.0)).reshape(1, 1, 16, 16)
    net = FrameScattering(1, factor=1, paths="decreasing")
    unscaled = net.layers[0].frame.spectrum(16, 16, x).abs().max() / net.layers[0].spectrum(x).abs().max()
    ours = [phi * unscaled ** (n + 1) for n, phi in enumerate(net.features(x))]
    assert [phi.shape[2] for phi in ours] == [1, 8, 16]
    ours = torch.cat(ours, 2)[0, 0, :, 4, 4]
    error = (ours - torch.tensor(KYMATIO)).abs()
    assert error[0] < 2e-5 and error[1:9].max() < 0.004 and error[9:].max() < 0.001
    assert error[1:].norm() / torch.tensor(KYMATIO)[1:].norm() < 0.03


@pytest.mark.parametrize("size", [(16, 16), (9, 14)])
@pytest.mark.parametrize("frame", [Morlet(2, 3), WeylHeisenberg(3), WeylHeisenberg(4), Haar(2), RandomKernels(5, 3)])
def test_frame_bounds_bound_the_energy(frame, size):
    low, high = frame_bounds(frame, *size)
    f = torch.randn(64, 1, *size, dtype=torch.complex128)
    parts = torch.fft.ifft2(torch.fft.fft2(f) * frame.spectrum(*size, f))
    energy = parts.abs().square().sum((1, 2, 3)) / f.abs().square().sum((1, 2, 3))
    assert (energy >= low - 1e-9).all() and (energy <= high + 1e-9).all()
    total = littlewood_paley(frame.spectrum(*size, f))
    place = int(total.argmax())  # the bound is reached by the wave of that frequency
    wave = torch.zeros(*size, dtype=torch.complex128).flatten().index_fill(0, torch.tensor(place), 1).view(size)
    one = (
        torch.fft.ifft2(wave * frame.spectrum(*size, f)).abs().square().sum()
        / torch.fft.ifft2(wave).abs().square().sum()
    )
    assert float(one) == pytest.approx(high)


def test_haar_is_tight_and_kernels_are_convolutions():
    assert frame_bounds(Haar(3), 13, 16) == pytest.approx((1, 1))
    frame, f = RandomKernels(3, 3), image(8)
    spectrum = frame.spectrum(8, 8, f)
    ours = torch.fft.ifft2(torch.fft.fft2(f) * spectrum).real
    expected = F.conv2d(F.pad(f, (2, 0, 2, 0), "circular"), frame.kernels.double().flip(1, 2)[:, None])
    assert torch.allclose(ours, expected, atol=1e-6)
    assert RandomKernels(2, 5).spectrum(3, 3, f).shape == (3, 3, 3), "kernels may be larger than the map"


def test_real_frames_give_real_signals():
    for frame in (Haar(2), RandomKernels(4, 5)):
        atoms = torch.fft.ifft2(frame.spectrum(9, 12, torch.zeros((), dtype=torch.float64)))
        assert atoms.imag.abs().max() < 1e-7
    assert FrameScattering(1, "haar", "tanh").features(image())[1].dtype == torch.float64
    assert FrameScattering(1, "morlet", "tanh").features(image())[1].dtype == torch.complex128


@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_constants_of_the_nonlinearities(nonlinearity):
    function, constant = NONLINEARITIES[nonlinearity]
    a, b = torch.randn(2, 4000, dtype=torch.complex128)
    assert not function(torch.zeros(3)).any() and not function(torch.zeros(3, dtype=torch.complex64)).abs().any()
    assert ((function(a) - function(b)).abs() <= constant * (a - b).abs() + 1e-12).all()


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_constants_of_pooling_on_the_grid(pooling, factor):
    """Never exceeded, at odd sizes too, and reached by some signal."""
    pool = POOLINGS[pooling]
    a, b = torch.randn(2, 50, 7, 8, dtype=torch.float64)
    ratio = (pool.function(a, factor) - pool.function(b, factor)).flatten(1).norm(dim=1) / (a - b).flatten(1).norm(
        dim=1
    )
    assert (ratio <= pool.constant(factor) + 1e-12).all()
    reaching = torch.ones(factor, factor) if pooling == "average" else F.pad(torch.ones(1, 1), (0, factor - 1) * 2)
    reached = pool.function(reaching, factor).norm() / reaching.norm()
    assert float(reached) == pytest.approx(pool.constant(factor))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
@pytest.mark.parametrize("frame", FRAMES)
def test_distances_are_not_expanded(frame, nonlinearity, pooling):
    net = FrameScattering(1, frame, nonlinearity, pooling, angles=3, filters=3).double()
    assert max(admissibility(net, 16, 16)) == pytest.approx(1) and min(admissibility(net, 16, 16)) == pytest.approx(1)
    f = image()
    for h in (torch.zeros_like(f), f.roll(1, 0), f + 0.01 * torch.randn_like(f), f.roll(1, 3)):
        assert expansion(net, f, h).max() <= 1


def test_trap_sub_sampling_has_another_constant_on_the_grid():
    """A pixel that sub-sampling keeps counts S^2-fold; the constant 1 of the plane would let Phi expand."""
    net = FrameScattering(1, "random", pooling="subsample", depth=1, kernel_size=1, filters=1)
    net.layers[0].frame.kernels.fill_(1.0)
    net.layers[1].frame.kernels.copy_(torch.tensor([0.0, 1.0])[:, None, None])
    pixel = F.pad(torch.ones(1, 1, 1, 1), (0, 7, 0, 7))
    assert expansion(net, pixel, torch.zeros_like(pixel)) < 1
    net.layers[0].pooling = net.layers[0].pooling._replace(constant=lambda s: 1.0)
    assert expansion(net, pixel, torch.zeros_like(pixel)) > 1.5


@pytest.mark.parametrize("frame", ["morlet", "weyl_heisenberg", "haar", "random"])
def test_translations_move_deeper_layers_less(frame):
    net, f = FrameScattering(1, frame, angles=3, filters=3, depth=2).double(), image(32)
    before, after = net.features(f), net.features(f.roll(4, 2))
    change = norms([a - b for a, b in zip(after, before)]) / f.flatten(1).norm(dim=1)
    bounds = torch.tensor(translation_bounds(net, 32, 32, 4))
    assert (change <= bounds[:, None]).all() and (change[1:] < 0.7 * change[:-1]).all()
    for n, (a, b) in enumerate(zip(after, before)):
        assert torch.allclose(a, b.roll(4 // 2**n, 3), atol=1e-10), "with pooling the features move by t / S^n"
    assert decay_constants(net, 32, 32)[0] <= 0.5**0.5


def test_deformations_are_exact_on_waves_and_bounded():
    y, x = torch.meshgrid(*[torch.arange(16, dtype=torch.float64)] * 2, indexing="ij")
    tau = torch.stack((0.4 * torch.sin(2 * torch.pi * x / 16), 0.3 * torch.cos(2 * torch.pi * y / 16)))
    phase = 0.05 * torch.cos(2 * torch.pi * x / 16)
    wave = torch.cos(2 * torch.pi * (2 * (y - tau[0]) + 3 * (x - tau[1])) / 16)
    f = torch.cos(2 * torch.pi * (2 * y + 3 * x) / 16)
    assert torch.allclose(deform(f, tau), wave, atol=1e-10)
    assert torch.allclose(deform(f, tau, phase), wave * torch.exp(2j * torch.pi * phase), atol=1e-10)
    whole = torch.stack((torch.full((16, 16), 2.0), torch.full((16, 16), -1.0))).double()
    assert torch.allclose(deform(f, whole), f.roll((2, -1), (0, 1)), atol=1e-10)
    smooth = band_limited(image(), 0.15)
    net = FrameScattering(1, angles=3).double()
    for size in (0.1, 0.5, 1.0):
        moved = deform(smooth, size * tau)
        raw = ((moved - smooth).flatten(1).norm(dim=1) / smooth.flatten(1).norm(dim=1)).max()
        assert raw <= deformation_bound(size * tau, 0.15) and expansion(net, moved, smooth).max() <= 1
    with pytest.raises(BadInput, match=r"needs 0\.25 or less"):
        deformation_bound(4 * tau, 0.15)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_batched_paths_are_the_definition(frame, nonlinearity):
    net, x = FrameScattering(2, frame, nonlinearity, "max", (1, 2), angles=2, filters=3), torch.randn(2, 2, 9, 12)
    assert torch.allclose(net(x), net.reference(x), atol=1e-6)


def test_frames_and_steps_may_differ_by_layer():
    net = opsin.create(
        "scattering_theory", dim=3, frame=("haar", "morlet", "learned"), nonlinearity=("relu", "modulus"),
        pooling=("max", "average"), factor=(2, 3), scales=1,
    )  # fmt: skip
    y = net(torch.randn(2, 3, 13, 12))
    assert y.shape == (2, 3 * (1 + 3 + 12), 3, 2) and [len(p) for p in net.paths] == [1, 3, 12]
    assert net.paths[2][5] == (1, 1) and torch.allclose(
        net.reference(x := torch.randn(1, 3, 12, 12)), net(x), atol=1e-6
    )


def test_decreasing_paths_are_a_part_of_all():
    every, some, x = FrameScattering(1), FrameScattering(1, paths="decreasing"), image()
    kept = [every.paths[2].index(path) for path in some.paths[2]]
    assert len(kept) == 16 and torch.equal(every.features(x)[2][:, :, kept], some.features(x)[2])


def test_learned_frames_learn_and_stay_admissible():
    net, x = FrameScattering(1, "learned", filters=3, kernel_size=3), torch.randn(4, 1, 8, 8)
    optimiser = torch.optim.SGD(net.parameters(), 5.0)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(3):
        optimiser.zero_grad()
        (-net(x).square().sum()).backward()
        optimiser.step()
    assert all((a != b).any() for a, b in zip(before, net.parameters())) and isinstance(
        net.layers[0].frame, LearnedKernels
    )
    assert max(admissibility(net, 8, 8)) == pytest.approx(1)


def test_complaints_are_sentences():
    for options, error, match in (
        ({"frame": "gabor"}, UnknownName, "frame called 'gabor'"), ({"nonlinearity": "gelu"}, UnknownName, "gelu"),
        ({"pooling": "mean"}, UnknownName, "pooling called 'mean'"), ({"factor": 0}, BadInput, "factor=0"),
        ({"factor": (2, 2, 2)}, BadInput, "factor has 3 entries"),
        ({"paths": "some"}, BadInput, "'all' or 'decreasing'"),
        ({"paths": "decreasing", "frame": "random"}, BadInput, "frames with scales"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            FrameScattering(1, **options)
    for wrong in (Morlet(0, 2), Haar(0), WeylHeisenberg(1)):
        with pytest.raises(BadInput, match="or more"):
            wrong.spectrum(8, 8, torch.zeros(1))


def held(net: FrameScattering) -> float:
    """Numbers per input number that a forward pass holds, by the card's formula."""
    paths, grid, before, most = [len(p) for p in net.paths], 1.0, 0.0, 0.0
    for n, layer in enumerate(net.layers[:-1]):
        before += 2 * paths[n] * grid
        most = max(most, before + (6 * paths[n + 1] + 3 * paths[n]) * grid)
        grid /= layer.factor**2
    return max(most, before + 7 * paths[-1] * grid)


def test_the_card_counts_what_a_forward_pass_holds():
    x = torch.rand(2, 16, 28, 28)
    said = card_of("scattering_theory").facts["memory"]
    (at_defaults,) = re.findall(r"about (\d+) \* N \* C numbers forward at the defaults", said)
    assert peak_memory(FrameScattering(16), (x,)) / x.nbytes == pytest.approx(float(at_defaults), rel=0.05)
    for options in (
        {}, {"factor": 1}, {"depth": 1}, {"depth": 3, "angles": 2}, {"frame": "haar"}, {"nonlinearity": "relu"},
        {"paths": "decreasing"},
    ):  # fmt: skip
        net = FrameScattering(16, **options)
        assert held(net) == pytest.approx(peak_memory(net, (x,)) / x.nbytes, rel=0.1), options
