"""The theorems on scattering as numbers: what `FrameScattering` may do to distances, translations and deformations.

Wiatowski and Boelcskei 2018, arXiv:1512.06293, for an admissible network Phi with features Phi^n of layer n:

    || Phi(f) - Phi(h) || <= || f - h ||
    || Phi^n(T_t f) - Phi^n(f) || <= 2 pi |t| K_n / (S_1 .. S_n) || f ||,      K_n = sup_w |chi_n^(w)| |w|
    || Phi(F f) - Phi(f) || <= C (R sup|tau| + sup|omega|) || f ||,   F f(x) = exp(2 pi i omega(x)) f(x - tau(x))

the last for f with frequencies below R and sup|D tau| <= 1 / (2 d). Lengths are in pixels, frequencies in cycles per
pixel; norms of features are root sums of squares on each layer's own grid.
"""

from collections.abc import Sequence
from math import pi, prod

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from opsin.errors import BadInput
from opsin.ops.spectral.frames import littlewood_paley, radius
from opsin.ops.spectral.scattering_theory import DIMENSIONS, FrameScattering


def norms(features: Sequence[Tensor]) -> Float[Tensor, "layers n"]:
    """|| Phi^n || of every layer and sample."""
    return torch.stack([phi.abs().flatten(1).norm(dim=1) for phi in features])


def expansion(net: FrameScattering, f: Float[Tensor, "n c h w"], h: Float[Tensor, "n c h w"]) -> Float[Tensor, " n"]:
    """|| Phi(f) - Phi(h) || / || f - h ||, at most 1; zeros for h give || Phi(f) || / || f ||."""
    apart = norms([a - b for a, b in zip(net.features(f), net.features(h), strict=True)])
    return apart.norm(dim=0) / (f - h).flatten(1).norm(dim=1)


def sizes(net: FrameScattering, height: int, width: int) -> list[tuple[int, int]]:
    """The grid of every layer."""
    found = [(height, width)]
    for layer in net.layers[:-1]:
        found.append((-(-found[-1][0] // layer.factor), -(-found[-1][1] // layer.factor)))
    return found


@torch.no_grad()
def admissibility(net: FrameScattering, height: int, width: int) -> list[float]:
    """max(B_n, B_n L_n^2 R_n^2) of every layer, with the constants of pooling on the grid. At most 1."""
    probes = (torch.zeros(size, dtype=torch.float64) for size in sizes(net, height, width))
    return [
        float(littlewood_paley(layer.spectrum(probe)).max()) * max(1.0, layer.gain**2)
        for layer, probe in zip(net.layers, probes, strict=True)
    ]


@torch.no_grad()
def decay_constants(net: FrameScattering, height: int, width: int) -> list[float]:
    """K_n of every layer's output atom."""
    found = []
    for layer, size in zip(net.layers, sizes(net, height, width), strict=True):
        probe = torch.zeros(size, dtype=torch.float64)
        found.append(float((layer.spectrum(probe)[-1].abs() * radius(*size, probe)).max()))
    return found


def translation_bounds(net: FrameScattering, height: int, width: int, distance: float) -> list[float]:
    """Per layer, the bound on || Phi^n(T_t f) - Phi^n(f) || / || f || for a translation by `distance` pixels.

    On a grid it holds where sub-sampling commutes with the translation: t a multiple of S_1 .. S_n on both axes.
    """
    factors = [prod(layer.factor for layer in net.layers[:n]) for n in range(net.depth + 1)]
    return [2 * pi * distance * k / s for k, s in zip(decay_constants(net, height, width), factors, strict=True)]


def deform(
    f: Float[Tensor, "*n h w"], tau: Float[Tensor, "2 h w"], omega: Float[Tensor, "h w"] | None = None
) -> Float[Tensor, "*n h w"] | Complex[Tensor, "*n h w"]:
    """exp(2 pi i omega(x)) f(x - tau(x)), with f continued between its pixels by its Fourier series.

    tau: displacement in pixels, rows first. Real for real f without omega.
    """
    height, width = f.shape[-2:]
    spectrum = torch.fft.fft2(f, norm="forward")
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=f.device) for n in (height, width)), indexing="ij"))
    rows, columns = (place - tau).flatten(1)
    wave_y, wave_x = (
        torch.exp(2j * pi * torch.fft.fftfreq(n, dtype=tau.dtype, device=f.device) * where[:, None])
        for n, where in ((height, rows), (width, columns))
    )
    y = torch.einsum("py,...yx,px->...p", wave_y, spectrum, wave_x).unflatten(-1, (height, width))
    if omega is not None:
        return torch.exp(2j * pi * omega) * y
    return y if f.is_complex() else y.real


def steepness(tau: Float[Tensor, "2 h w"]) -> float:
    """sup|D tau|: the largest difference of a component between neighbouring pixels, around the torus too."""
    return max(float((tau.roll(1, axis) - tau).abs().max()) for axis in (1, 2))


def deformation_bound(
    tau: Float[Tensor, "2 h w"], bandwidth: float, omega: Float[Tensor, "h w"] | None = None
) -> float:
    """The bound on || F f - f || / || f ||, and so on that of the features, for f with frequencies below `bandwidth`.

    2 pi (sqrt(2) R sup|tau| + sup|omega|): the path from x to x - tau(x) meets the gradient, at most 2 pi R || f ||,
    under a change of variables whose determinant is 1/2 at least. Raises BadInput where tau is too steep for that.
    """
    if steepness(tau) > 1 / (2 * DIMENSIONS):
        raise BadInput(
            f"tau changes by {steepness(tau):.3f} per pixel; the theorem needs {1 / (2 * DIMENSIONS)} or less"
        )
    warp = 2**0.5 * bandwidth * float(tau.square().sum(0).max()) ** 0.5
    return 2 * pi * (warp + (0.0 if omega is None else float(omega.abs().max())))


def band_limited(f: Float[Tensor, "*n h w"], bandwidth: float) -> Float[Tensor, "*n h w"]:
    """f without its frequencies above `bandwidth`."""
    return torch.fft.ifft2(torch.fft.fft2(f) * (radius(*f.shape[-2:], f) <= bandwidth)).real
