"""Data: sources, transforms and degradations behind one `open(source)`.

Every split is a map-style dataset of `(image, target)`:

| task     | image                                  | target                                             |
| -------- | -------------------------------------- | -------------------------------------------------- |
| classify | float32 (C, H, W) in [0, 1]            | int, the class                                     |
| segment  | float32 (C, H, W)                      | int64 (H, W), the class of each pixel; 255 ignored |
| detect   | float32 (C, H, W)                      | `Boxes`                                            |
| restore  | float32 (C, h, w), the degraded image  | float32 (C, H, W), the clean one                   |
| images   | float32 (C, H, W)                      | 0 (no labels: pre-training, video frames)          |
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from opsin.errors import BadInput

IGNORE = 255


class Boxes(NamedTuple):
    """Objects of one image: corners x0, y0, x1, y1 in pixels, and a class each."""

    boxes: Float[Tensor, "n 4"]
    labels: Int[Tensor, " n"]


@runtime_checkable
class Split(Protocol):
    """One part of a data set."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], Any]: ...


@dataclass
class Data:
    """An opened source.

    splits: any of "train", "val", "test".
    task: a row of the module's table.
    channels, size: of the first image; size is (height, width), and None where images differ in size.
    skipped: unreadable files, each with the reason; they are left out of the splits.
    mean, std: per channel, over the training split (or a sample of it); what `fit` normalises with.
    """

    name: str
    task: str
    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    channels: int = 3
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    scale: int = 1  # of a restoration task: target size over image size

    @property
    def train(self) -> Split:
        return self._first("train")

    @property
    def val(self) -> Split:
        """The split that models are chosen on; the test split where there is no other, and then the training split."""
        return self._first("val", "test", "train")

    @property
    def test(self) -> Split:
        """The test split, or else the validation split, or else the training split."""
        return self._first("test", "val", "train")

    def _first(self, *names: str) -> Split:
        for name in names:
            if name in self.splits:
                return self.splits[name]
        raise BadInput(f"the data set {self.name} has no split '{names[0]}'; it has: {', '.join(self.splits)}")


class Subset:
    """Some samples of a split, in the given order."""

    def __init__(self, split: Split, indices: Sequence[int]):
        self.split, self.indices = split, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        return self.split[self.indices[index]]

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        return (self[i] for i in range(len(self)))


def open(source: str, **options: Any) -> Data:
    """Opens a data set by name or path; options: see `opsin.data.options.Options`.

    Raises BadInput, UnknownName, MissingData, each one sentence.
    """
    from opsin.data.sources import open_source

    return open_source(source, **options)
