"""Filter banks as frames: what a scattering layer convolves with, on periodic images of any size.

A frame has atoms g_1 .. g_L and an output atom chi, mostly low-pass, and bounds A <= B such that for every image

    A ||f||^2  <=  ||f * chi||^2 + sum_l ||f * g_l||^2  <=  B ||f||^2

which holds exactly if the Littlewood-Paley sum |chi^|^2 + sum_l |g_l^|^2 lies within [A, B] at every frequency.
Members: Morlet wavelets (as Bruna and Mallat 2013, arXiv:1203.1513, use them), a Weyl-Heisenberg (Gabor) grid, Haar
wavelets, and k x k kernels, random or learned. Frequencies are in cycles per pixel.
"""

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from opsin.errors import BadInput

Spectrum = Complex[np.ndarray, "atoms h w"]


class Frame(nn.Module):
    """count: atoms without chi. real: whether they are real in space. levels: the scale of each, or None."""

    count: int
    real: bool = False
    levels: tuple[int, ...] | None = None

    def spectrum(self, height: int, width: int, like: Tensor) -> Complex[Tensor, "atoms h w"]:
        """Fourier transforms of the atoms, chi last, in the precision and on the device of `like`."""
        raise TypeError(f"{type(self).__name__} does not implement spectrum()")


class FixedFrame(Frame):
    """A frame given by formulas, computed once for each size."""

    def __init__(self, count: int, levels: tuple[int, ...] | None = None):
        super().__init__()
        self.count, self.levels = count, levels

    def formula(self, height: int, width: int) -> Spectrum:
        raise TypeError(f"{type(self).__name__} does not implement formula()")

    def spectrum(self, height: int, width: int, like: Tensor) -> Complex[Tensor, "atoms h w"]:
        return torch.from_numpy(self.formula(height, width)).to(like.device, complex_of(like))


class Morlet(FixedFrame):
    """`scales` octaves of `angles` directions: waves of 3/4 pi 2^-j under Gaussians of width 0.8 2^j, without mean."""

    def __init__(self, scales: int = 2, angles: int = 4):
        super().__init__(scales * angles, tuple(j for j in range(scales) for _ in range(angles)))
        self.scales, self.angles = scales, angles

    def formula(self, height: int, width: int) -> Spectrum:
        return morlet_bank(self.scales, self.angles, height, width)


class WeylHeisenberg(FixedFrame):
    """A Gaussian moved to each of `cells` x `cells` frequencies; chi is the one at 0."""

    def __init__(self, cells: int = 3):
        super().__init__(cells**2 - 1)
        self.cells = cells

    def formula(self, height: int, width: int) -> Spectrum:
        return gabor_grid(self.cells, height, width)


class Haar(FixedFrame):
    """`scales` octaves of horizontal, vertical and diagonal differences, without decimation; A = B = 1."""

    real = True

    def __init__(self, scales: int = 2):
        super().__init__(3 * scales, tuple(j for j in range(scales) for _ in range(3)))
        self.scales = scales

    def formula(self, height: int, width: int) -> Spectrum:
        return haar_bank(self.scales, height, width)


class RandomKernels(Frame):
    """`filters` Gaussian kernels of k x k taps, fixed, and the k x k mean as chi."""

    real = True

    def __init__(self, filters: int = 8, kernel_size: int = 5):
        super().__init__()
        self.count = filters
        kernels = torch.randn(filters + 1, kernel_size, kernel_size) / kernel_size
        kernels[-1] = kernel_size**-2
        self.keep(kernels)

    def keep(self, kernels: Tensor) -> None:
        self.register_buffer("kernels", kernels)

    def spectrum(self, height: int, width: int, like: Tensor) -> Complex[Tensor, "atoms h w"]:
        taps = torch.arange(self.kernels.shape[-1], device=like.device, dtype=like.real.dtype)
        grids = (torch.arange(n, device=like.device, dtype=like.real.dtype)[:, None] / n for n in (height, width))
        waves = [torch.exp(-2j * torch.pi * taps * grid) for grid in grids]
        return torch.einsum("lab,ya,xb->lyx", self.kernels.to(complex_of(like)), *waves)


class LearnedKernels(RandomKernels):
    """The same kernels as parameters, chi included."""

    def keep(self, kernels: Tensor) -> None:
        self.kernels = nn.Parameter(kernels)


FRAMES = {
    "morlet": Morlet, "weyl_heisenberg": WeylHeisenberg, "haar": Haar, "random": RandomKernels,
    "learned": LearnedKernels,
}  # fmt: skip


def complex_of(like: Tensor) -> torch.dtype:
    return torch.complex128 if like.dtype in (torch.float64, torch.complex128) else torch.complex64


def littlewood_paley(spectrum: Complex[Tensor, "atoms h w"]) -> Float[Tensor, "h w"]:
    """The sum over the atoms of squared moduli, per frequency."""
    return (spectrum.real.square() + spectrum.imag.square()).sum(0)


def frame_bounds(frame: Frame, height: int, width: int, *, real_images: bool = False) -> tuple[float, float]:
    """A and B on periodic images of this size; for real images, frequencies w and -w count half each."""
    total = littlewood_paley(frame.spectrum(height, width, torch.zeros((), dtype=torch.float64)))
    if real_images:
        total = (total + total.flip((0, 1)).roll((1, 1), (0, 1))) / 2
    return float(total.min()), float(total.max())


def radius(height: int, width: int, like: Tensor) -> Float[Tensor, "h w"]:
    """|w| of every frequency of the grid, in cycles per pixel."""
    rows, columns = (torch.fft.fftfreq(n, device=like.device, dtype=like.real.dtype) for n in (height, width))
    return torch.hypot(rows[:, None], columns)


def gaussian_waves(
    height: int, width: int, sigma: float, frequencies: Float[np.ndarray, "n 2"], angle: float, slant: float
) -> Complex[np.ndarray, "n h w"]:
    """Waves (radians per pixel) under one Gaussian, periodic, of width sigma along `angle` and sigma / slant across."""
    y, x = np.arange(-2 * height, 3 * height)[:, None], np.arange(-2 * width, 3 * width)
    along, across = y * np.cos(angle) + x * np.sin(angle), x * np.cos(angle) - y * np.sin(angle)
    window = np.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2))
    phase = frequencies[:, 0, None, None] * y + frequencies[:, 1, None, None] * x
    waves = (window * np.exp(1j * phase)).reshape(-1, 5, height, 5, width).sum((1, 3))
    return waves * slant / (2 * np.pi * sigma**2)


@lru_cache(maxsize=64)
def morlet_bank(scales: int, angles: int, height: int, width: int) -> Spectrum:
    """Octave by octave, angle by angle, and the Gaussian of the coarsest octave as chi."""
    if scales < 1 or angles < 1:
        raise BadInput(f"Morlet wavelets need scales and angles of 1 or more, not {scales} and {angles}")
    atoms = []
    for j in range(scales):
        for l in range(angles):
            angle = (int(angles - angles / 2 - 1) - l) * np.pi / angles
            wave = 0.75 * np.pi / 2**j * np.array([[np.cos(angle), np.sin(angle)], [0, 0]])
            ripple, bump = gaussian_waves(height, width, 0.8 * 2**j, wave, angle, 4 / angles)
            atoms.append(ripple - ripple.sum() / bump.sum() * bump)
    atoms.append(gaussian_waves(height, width, 0.8 * 2 ** (scales - 1), np.zeros((1, 2)), 0.0, 1.0)[0])
    return np.fft.fft2(np.stack(atoms))


@lru_cache(maxsize=64)
def gabor_grid(cells: int, height: int, width: int) -> Spectrum:
    """Gaussians in frequency at the multiples of 1 / cells, half a cell wide."""
    if cells < 2:
        raise BadInput(f"a Weyl-Heisenberg grid needs cells=2 or more, not {cells}")

    def axis(n: int) -> Float[np.ndarray, "cells n"]:
        offset = np.arange(n) / n - np.arange(cells)[:, None] / cells
        turns = offset[..., None] + np.arange(-2, 3)
        return np.exp(-0.5 * (2 * cells * turns) ** 2).sum(-1)

    atoms = np.einsum("ay,bx->abyx", axis(height), axis(width)).reshape(-1, height, width)
    return np.roll(atoms, -1, 0).astype(complex)


@lru_cache(maxsize=64)
def haar_bank(scales: int, height: int, width: int) -> Spectrum:
    """Per octave the three products with a difference, after the means of the finer octaves; chi is all the means."""
    if scales < 1:
        raise BadInput(f"Haar wavelets need scales=1 or more, not {scales}")
    atoms, low = [], np.ones((height, width), complex)
    for j in range(scales):
        moved = [np.exp(-2j * np.pi * 2**j * np.arange(n) / n) for n in (height, width)]
        (mean_y, mean_x), (step_y, step_x) = ([(1 + sign * m) / 2 for m in moved] for sign in (1, -1))
        pairs = ((step_y, mean_x), (mean_y, step_x), (step_y, step_x))
        atoms += [low * a[:, None] * b for a, b in pairs]
        low = low * mean_y[:, None] * mean_x
    return np.stack([*atoms, low])
