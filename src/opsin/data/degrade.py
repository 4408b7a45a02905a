"""Degradations: what happened to the photo before we got it.

Each is a small frozen class, `degradation(image, generator=None) -> image`, on one float image (C, H, W) in [0, 1].
Randomness comes from the generator (torch's global one by default). `scale` is the factor by which the result is
smaller. Results stay in [0, 1] except for `Noise`, which the denoising literature does not clamp.

`degradation("noise:25")` makes one by its name in `DEGRADATIONS`, with its arguments after colons;
`degradation("blur:1.5+bicubic:3+jpeg:60")` applies several in turn.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from kornia.filters import gaussian_blur2d, motion_blur
from PIL import Image
from torch import Generator, Tensor

from opsin.data import Split
from opsin.data.resample import Border, bicubic_resize
from opsin.data.splits import generator_of
from opsin.errors import BadInput, UnknownName

__all__ = ["DEGRADATIONS", "Border", "Degradation", "Degraded", "bicubic_resize", "degradation"]


class Degradation:
    """An image made worse. The base class leaves it as it is."""

    scale: int = 1

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h2 w2"]:
        return image

    def require(self, condition: bool, what: str) -> None:
        """Raises BadInput with the degradation's name unless the condition holds."""
        if not condition:
            raise BadInput(f"the degradation {type(self).__name__.lower()} needs {what}")


@dataclass(frozen=True)
class Bicubic(Degradation):
    """Antialiased bicubic down-sampling (MATLAB's convention), rounded to 8 bits as the benchmarks' files are."""

    scale: int = 2

    def __post_init__(self) -> None:
        self.require(isinstance(self.scale, int) and self.scale >= 1, "a whole scale of at least 1")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h2 w2"]:
        return bicubic_resize(image, scale=1 / self.scale).clamp(0, 1).mul(255).round().div(255)


@dataclass(frozen=True)
class Noise(Degradation):
    """White Gaussian noise; sigma in grey levels of 255. Not clamped."""

    sigma: float = 25.0

    def __post_init__(self) -> None:
        self.require(self.sigma >= 0, "sigma >= 0")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        return image + _normal(image.shape, generator) * (self.sigma / 255)


@dataclass(frozen=True)
class Poisson(Degradation):
    """Photon noise: white is `peak` photons per pixel and channel on average."""

    peak: float = 30.0

    def __post_init__(self) -> None:
        self.require(self.peak > 0, "peak > 0")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        return (torch.poisson(image.clamp(0, 1) * self.peak, generator=generator) / self.peak).clamp(0, 1)


@dataclass(frozen=True)
class Jpeg(Degradation):
    """Coded and decoded by the real codec (libjpeg, 4:2:0 chroma); quality 1 to 100."""

    quality: int = 40

    def __post_init__(self) -> None:
        self.require(isinstance(self.quality, int) and 1 <= self.quality <= 100, "a whole quality of 1 to 100")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        levels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
        buffer = io.BytesIO()
        Image.fromarray(levels if levels.shape[2] == 3 else levels[..., 0]).save(buffer, "JPEG", quality=self.quality)
        decoded = np.array(Image.open(buffer)).reshape(levels.shape)
        return torch.from_numpy(decoded).permute(2, 0, 1).to(image.dtype).div(255).contiguous()


@dataclass(frozen=True)
class Blur(Degradation):
    """Gaussian blur of `sigma` pixels; edges are repeated."""

    sigma: float = 1.6

    def __post_init__(self) -> None:
        self.require(self.sigma > 0, "sigma > 0")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        return _gaussian(image, self.sigma)


@dataclass(frozen=True)
class Motion(Degradation):
    """Blur along a line of `length` pixels (odd) at `angle` degrees; a random angle for each image without one."""

    length: int = 15
    angle: float | None = None

    def __post_init__(self) -> None:
        self.require(isinstance(self.length, int) and self.length >= 3 and self.length % 2 == 1, "an odd length >= 3")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        angle = self.angle if self.angle is not None else 180 * torch.rand(1, generator=generator).item()
        return motion_blur(image[None], self.length, angle, 0.0, border_type="replicate")[0].clamp(0, 1)


@dataclass(frozen=True)
class Haze(Degradation):
    """Koschmieder's model of scattering: I = J t + A (1 - t), t = exp(-beta depth).

    beta: scattering per unit of depth; airlight: A. The depth, in [0, 1], is a smooth random scene that recedes
    towards the top; `through(image, depth)` takes a depth map (H, W) instead.
    """

    beta: float = 1.5
    airlight: float = 0.9

    def __post_init__(self) -> None:
        self.require(self.beta >= 0 and 0 <= self.airlight <= 1, "beta >= 0 and an airlight in [0, 1]")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        height, width = image.shape[-2:]
        hills = torch.rand(1, 4, 4, generator=generator)
        hills = bicubic_resize(hills, size=(height, width)).clamp(0, 1)[0]
        recede = torch.linspace(1, 0, height)[:, None]
        return self.through(image, 0.7 * recede + 0.3 * hills)

    def through(self, image: Float[Tensor, "c h w"], depth: Float[Tensor, "h w"]) -> Float[Tensor, "c h w"]:
        """The image as seen through haze of this density over the given depths."""
        transmission = torch.exp(-self.beta * depth.to(image))
        return image * transmission + self.airlight * (1 - transmission)


@dataclass(frozen=True)
class Rain(Degradation):
    """Streaks added to the image: sparse drops drawn out along one direction, O = min(1, B + S).

    amount: share of pixels in which a streak starts; length: of the streaks in pixels; strength: of their light.
    """

    amount: float = 0.01
    length: int = 15
    strength: float = 0.8

    def __post_init__(self) -> None:
        self.require(0 <= self.amount <= 1, "an amount in [0, 1]")
        self.require(isinstance(self.length, int) and self.length >= 3 and self.length % 2 == 1, "an odd length >= 3")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        drops = (torch.rand(1, *image.shape[-2:], generator=generator) < self.amount).to(image)
        slant = 60 + 60 * torch.rand(1, generator=generator).item()  # degrees; 90 falls straight down
        streaks = motion_blur(drops[None], self.length, slant, 0.0, border_type="constant")[0] * self.length
        return (image + self.strength * _gaussian(streaks, 0.5).clamp(0, 1)).clamp(0, 1)


@dataclass(frozen=True)
class Dark(Degradation):
    """Low light: (gain J)^gamma, and the sensor's noise on it, of variance shot I + read^2."""

    gamma: float = 2.5
    gain: float = 0.6
    shot: float = 0.002
    read: float = 0.005

    def __post_init__(self) -> None:
        self.require(self.gamma > 0 and 0 < self.gain <= 1, "gamma > 0 and a gain in (0, 1]")
        self.require(self.shot >= 0 and self.read >= 0, "shot >= 0 and read >= 0")

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h w"]:
        dark = (self.gain * image.clamp(0, 1)) ** self.gamma
        return (dark + (self.shot * dark + self.read**2).sqrt() * _normal(dark.shape, generator)).clamp(0, 1)


@dataclass(frozen=True)
class Chain(Degradation):
    """Several degradations in turn."""

    steps: tuple[Degradation, ...]

    @property
    def scale(self) -> int:  # type: ignore[override]
        return math.prod(step.scale for step in self.steps)

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h2 w2"]:
        for step in self.steps:
            image = step(image, generator)
        return image


DEGRADATIONS: dict[str, type[Degradation]] = {
    "bicubic": Bicubic, "noise": Noise, "poisson": Poisson, "jpeg": Jpeg, "blur": Blur, "motion": Motion,
    "haze": Haze, "rain": Rain, "dark": Dark,
}  # fmt: skip


def degradation(text: str) -> Degradation:
    """Makes a degradation from "name:argument:argument", or several joined by "+".

    Raises UnknownName for the name, BadInput for the arguments.
    """
    if "+" in text:
        return Chain(tuple(degradation(step) for step in text.split("+")))
    name, *arguments = text.strip().split(":")
    if name not in DEGRADATIONS:
        raise UnknownName("degradation", name, DEGRADATIONS)
    try:
        values: list[Any] = [int(a) if a.strip("-").isdigit() else float(a) for a in arguments]
        return DEGRADATIONS[name](*values)
    except (TypeError, ValueError) as error:
        raise BadInput(f"the degradation '{text}' has arguments that do not fit: {error}") from error


class Degraded:
    """A restoration split made of clean images: (degraded, clean), the clean one cut to a multiple of the scale.

    The randomness follows from the sample's index and the epoch (`set_epoch`), so that it does not depend on the order
    of loading, on workers, or on where a training was interrupted.
    """

    def __init__(self, split: Split, degrade: Degradation):
        self.split, self.degrade, self.epoch = split, degrade, 0
        self.in_order = getattr(split, "in_order", False)

    def set_epoch(self, epoch: int) -> None:
        """Draws new noise for the samples from here on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c H W"]]:
        index = range(len(self))[index]
        clean = self.split[index][0]
        height, width = (length - length % self.degrade.scale for length in clean.shape[-2:])
        if min(height, width) < self.degrade.scale:
            raise BadInput(
                f"an image of {clean.shape[-1]} x {clean.shape[-2]} pixels is too small for this degradation"
            )
        clean = clean[:, :height, :width]
        return self.degrade(clean, generator_of("degrade", self.epoch, index)), clean


def _normal(shape: torch.Size, generator: Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator)


def _gaussian(image: Float[Tensor, "c h w"], sigma: float) -> Float[Tensor, "c h w"]:
    side = 2 * math.ceil(3 * sigma) + 1
    return gaussian_blur2d(image[None], (side, side), (sigma, sigma), border_type="replicate")[0]
