"""Degradations: what happened to the photo before we got it.

Each is a small frozen class, `degradation(image, generator=None) -> image`, on one float image (C, H, W) in [0, 1].
Randomness comes from the generator (torch's global one by default). `scale` is the factor by which the result is
smaller. `degradation("noise:25")` makes one by its name in `DEGRADATIONS` and its arguments after colons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
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


@dataclass(frozen=True)
class Bicubic(Degradation):
    """Antialiased bicubic down-sampling (MATLAB's convention), rounded to 8 bits as the benchmarks' files are."""

    scale: int = 2

    def __call__(self, image: Float[Tensor, "c h w"], generator: Generator | None = None) -> Float[Tensor, "c h2 w2"]:
        return bicubic_resize(image, scale=1 / self.scale).clamp(0, 1).mul(255).round().div(255)


DEGRADATIONS: dict[str, type[Degradation]] = {"bicubic": Bicubic}


def degradation(text: str) -> Degradation:
    """Makes a degradation from "name:argument:argument", numbers in the order of the class's fields."""
    name, *arguments = text.split(":")
    if name not in DEGRADATIONS:
        raise UnknownName("degradation", name, DEGRADATIONS)
    try:
        values: list[Any] = [float(a) if "." in a else int(a) for a in arguments]
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

    def set_epoch(self, epoch: int) -> None:
        """Draws new noise for the samples from here on; also for the split that this one is made of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c H W"]]:
        index = range(len(self))[index]
        clean = self.split[index][0]
        height, width = (length - length % self.degrade.scale for length in clean.shape[-2:])
        clean = clean[:, :height, :width]
        return self.degrade(clean, generator_of("degrade", self.epoch, index)), clean
