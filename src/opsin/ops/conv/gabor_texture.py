"""Learned Gabor filters, and the statistics of what they respond to: texture features beside a CNN's shapes.

Zhu et al. 2023, "Learning Gabor Texture Features for Fine-Grained Recognition", arXiv:2308.05396. A filter is not k^2
free numbers but the formula of a wave under a Gaussian window, and five numbers of it are what is learned:

    g(x, y) = exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / lambda + psi)
    x' = x cos(theta) + y sin(theta),   y' = -x sin(theta) + y cos(theta)

The numbers stay valid because they are bounded functions of what the optimiser moves: theta in (0, pi), psi in
(-pi, pi), gamma in (0.2, 1), lambda inside the filter's own frequency band between 2 pixels (Nyquist) and the kernel's
side, and sigma follows from lambda and the half-response bandwidth b in (0.5, 2.5) octaves,

    sigma / lambda = (1 / pi) sqrt(ln 2 / 2) (2^b + 1) / (2^b - 1).

Kernels have zero mean, so that brightness does not enter texture, and length 1. A response map is described by the
histogram of its levels and by how often levels are neighbours, both with soft assignment. There is no public code; the
bands, the length and the soft assignment are our reading. The two-branch classifier is the card `gabor_classifier`.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput

BANDWIDTH, ASPECT = (0.5, 2.5), (0.2, 1.0)  # octaves; gamma
LEARNED = ("theta", "psi", "wavelength", "bandwidth", "aspect")
Values = Float[Tensor, " f"]


def sigma_of(wavelength: Values, bandwidth: Values) -> Values:
    """The window's width in pixels of a filter with this wavelength (pixels) and half-response bandwidth (octaves)."""
    ratio = 2**bandwidth
    return wavelength / math.pi * math.sqrt(math.log(2) / 2) * (ratio + 1) / (ratio - 1)


def gabor_kernels(
    sigma: Values, theta: Values, wavelength: Values, psi: Values, gamma: Values, side: int
) -> Float[Tensor, "f side side"]:
    """g(x, y) for f filters on a grid of side x side pixels around 0; rows are y. Not normalised."""
    axis = torch.arange(side, dtype=sigma.dtype, device=sigma.device) - side // 2
    cos, sin = torch.cos(theta)[:, None, None], torch.sin(theta)[:, None, None]
    sigma, wavelength, psi, gamma = (v[:, None, None] for v in (sigma, wavelength, psi, gamma))
    x, y = axis, axis[:, None]
    across, along = x * cos + y * sin, -x * sin + y * cos
    window = torch.exp(-(across**2 + (gamma * along) ** 2) / (2 * sigma**2))
    return window * torch.cos(2 * math.pi * across / wavelength + psi)


def without_mean(kernels: Float[Tensor, "f s s"]) -> Float[Tensor, "f s s"]:
    """Zero mean and length 1."""
    return F.normalize((kernels - kernels.mean((1, 2), keepdim=True)).flatten(1)).unflatten(1, kernels.shape[1:])


class GaborFilters(nn.Module):
    """`count` filters on a grid of scales and orientations, to be learned.

    Parameters are unbounded; `values()` gives the five numbers in their ranges. Every filter keeps to one of `bands`
    octave-like parts of the wavelengths from 2 to `side` pixels, so that all frequencies stay covered.
    Raises BadInput: an even side, one below 5, or no band.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, count: int, side: int = 11, bands: int = 4):
        super().__init__()
        if side % 2 == 0 or side < 5:
            raise BadInput(f"a Gabor filter of side {side} has no middle or no room for a wave; take 5, 7, 9, ...")
        if bands < 1:
            raise BadInput(f"bands={bands}; take 1 or more")
        self.count, self.side, self.bands = count, side, bands
        place = torch.arange(count)
        step = math.log(side / 2) / bands
        self.register_buffer("lowest", math.log(2) + step * (place % bands), persistent=False)
        self.register_buffer("highest", self.lowest + step, persistent=False)
        start = self._grid()
        self.theta, self.psi, self.wavelength, self.bandwidth, self.aspect = (nn.Parameter(start[n]) for n in LEARNED)

    def _grid(self) -> dict[str, Tensor]:
        """Where the learned numbers start: bands x orientations spread evenly, even and odd waves by turns."""
        turn = torch.arange(self.count) // self.bands
        phase = torch.where(turn % 2 == 0, 0.5, 0.75)  # psi = 0 and pi / 2
        turn = (turn + 0.5) / -(-self.count // self.bands)
        zero = torch.zeros(self.count)
        start = (torch.logit(turn), torch.logit(phase), zero, zero - 1.0, zero - 0.5)
        return dict(zip(LEARNED, start, strict=True))

    def values(self) -> dict[str, Values]:
        """theta, psi (radians), wavelength, sigma (pixels), bandwidth (octaves), gamma; in float32 at least."""
        raw = {name: getattr(self, name) for name in LEARNED}
        part = {name: torch.sigmoid(v.to(torch.promote_types(v.dtype, torch.float32))) for name, v in raw.items()}
        lowest = self.lowest.to(part["wavelength"].dtype)
        wavelength = torch.exp(lowest + (self.highest.to(lowest.dtype) - lowest) * part["wavelength"])
        bandwidth = BANDWIDTH[0] + (BANDWIDTH[1] - BANDWIDTH[0]) * part["bandwidth"]
        return {
            "theta": math.pi * part["theta"], "psi": math.pi * (2 * part["psi"] - 1), "wavelength": wavelength,
            "bandwidth": bandwidth, "sigma": sigma_of(wavelength, bandwidth),
            "gamma": ASPECT[0] + (ASPECT[1] - ASPECT[0]) * part["aspect"],
        }  # fmt: skip

    def forward(self) -> Float[Tensor, "f s s"]:
        """The kernels, made anew: zero mean, length 1, in the parameters' type."""
        v = self.values()
        kernels = gabor_kernels(v["sigma"], v["theta"], v["wavelength"], v["psi"], v["gamma"], self.side)
        return without_mean(kernels).to(self.theta.dtype)

    def stuck(self, margin: float = 0.01) -> Bool[Tensor, " f"]:
        """Filters one of whose numbers has come so near to its bound that its gradient has all but vanished."""
        parts = torch.stack([torch.sigmoid(getattr(self, name).detach().float()) for name in LEARNED])
        return ((parts < margin) | (parts > 1 - margin)).any(0)

    @torch.no_grad()
    def restart(self, which: Bool[Tensor, " f"]) -> None:
        """Puts filters back to where the grid has them."""
        for name, start in self._grid().items():
            parameter = getattr(self, name)
            parameter.copy_(torch.where(which, start.to(parameter), parameter))

    def extra_repr(self) -> str:
        return f"{self.count}, side={self.side}, bands={self.bands}"


class GaborConv(nn.Module):
    """The operator: (N, C, H, W) -> the same at stride 1; one learned Gabor filter per channel, 'same' zero padding.

    Five numbers per channel. Args: kernel_size, odd, from 5 on; bands: parts of the wavelengths that filters keep to.
    """

    def __init__(self, dim: int, kernel_size: int = 11, bands: int = 4, stride: int = 1):
        super().__init__()
        self.filters = GaborFilters(dim, kernel_size, bands)
        self.stride = stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        kernels = self.filters()
        return F.conv2d(x, kernels[:, None], stride=self.stride, padding=kernels.shape[1] // 2, groups=len(kernels))

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h2 w2"]:
        """The definition: the formula at every tap of a patch, less its mean, over its length."""
        side, v = self.filters.side, self.filters.values()
        taps = torch.cartesian_prod(*[torch.arange(side, dtype=x.dtype) - side // 2] * 2)
        y, x_ = taps.T
        waves = []
        for t, p, w, s, g in zip(*(v[n] for n in ("theta", "psi", "wavelength", "sigma", "gamma")), strict=True):
            across, along = x_ * t.cos() + y * t.sin(), y * t.cos() - x_ * t.sin()
            waves.append((-(across**2 + (g * along) ** 2) / (2 * s**2)).exp() * (2 * math.pi * across / w + p).cos())
        wave = torch.stack(waves) - torch.stack(waves).mean(1, keepdim=True)
        wave = wave / wave.square().sum(1, keepdim=True).sqrt()
        patches = F.unfold(x, side, padding=side // 2, stride=self.stride).unflatten(1, (x.shape[1], -1))
        size = [(length - 1) // self.stride + 1 for length in x.shape[2:]]
        return torch.einsum("nctp,ct->ncp", patches, wave).unflatten(2, size)

    def fuse(self) -> nn.Conv2d:
        """The depthwise convolution with today's kernels."""
        with torch.no_grad():
            kernels = self.filters()[:, None]
            conv = nn.Conv2d(
                len(kernels), len(kernels), kernels.shape[2], self.stride, kernels.shape[2] // 2, groups=len(kernels),
                bias=False, device=kernels.device, dtype=kernels.dtype,
            )  # fmt: skip
            conv.weight.copy_(kernels)
        return conv


def soft_levels(
    maps: Float[Tensor, "n f h w"], levels: int = 8, bandwidth: float = 0.5
) -> tuple[Float[Tensor, "n f l h w"], Float[Tensor, "n f l"]]:
    """How much every value belongs to each of `levels` values spread evenly from its map's minimum to its maximum.

    Gaussian weights of `bandwidth` level distances, which sum to 1 over the levels; towards bandwidth 0 the nearest
    level takes all. Returns the weights and the levels' values.
    """
    low, high = maps.amin((2, 3)), maps.amax((2, 3))
    distance = ((high - low) / (levels - 1)).clamp_min(1e-6)
    steps = torch.arange(levels, device=maps.device, dtype=maps.dtype)
    place = (maps - low[:, :, None, None]) / distance[:, :, None, None]  # 0 ... levels - 1
    weights = torch.softmax((place[:, :, None] - steps[:, None, None]).square() / (-2 * bandwidth**2), 2)
    return weights, low[..., None] + distance[..., None] * steps


def histogram(weights: Float[Tensor, "n f l h w"]) -> Float[Tensor, "n f l"]:
    """The part of a map that each level has; sums to 1 and does not change when the map is shuffled."""
    return weights.mean((3, 4))


def co_occurrence(weights: Float[Tensor, "n f l h w"]) -> Float[Tensor, "n f l l"]:
    """How often a level (rows) has a level (columns) to its right or below; sums to 1. Raises BadInput: one pixel."""
    height, width = weights.shape[3:]
    if height * width == 1:
        raise BadInput("a map of one pixel has no neighbours; take larger regions")
    right, below = (weights[..., :-1], weights[..., 1:]), (weights[..., :-1, :], weights[..., 1:, :])
    counts = sum(a.flatten(3) @ b.flatten(3).mT for a, b in (right, below))
    return counts / (height * (width - 1) + (height - 1) * width)


def parameter_groups(model: nn.Module, lr: float, gabor_lr: float | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser: Gabor numbers learn at `gabor_lr` (lr / 10 by default) without weight decay.

    Raises BadInput where the model has no Gabor filters.
    """
    filters = [m for m in model.modules() if isinstance(m, GaborFilters)]
    if not filters:
        raise BadInput(f"{type(model).__name__} has no Gabor filters")
    gabor = _unique(p for m in filters for p in m.parameters())
    known = {id(p) for p in gabor}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [
        {"params": rest, "lr": lr},
        {"params": gabor, "lr": lr / 10 if gabor_lr is None else gabor_lr, "weight_decay": 0.0},
    ]


def _unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())
