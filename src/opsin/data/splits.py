"""What every layout is made of: samples that are read when asked for, and the rules that divide and shorten them.

A layout (folders, Parquet, masks, ...) only lists what there is: a `Listing` of `Item`s. Here items become splits.
Every choice is a fixed function of the number and the order of the items (sorted by name), never of a random state:

- where a source has no splits of its own, 20 % are for testing and 10 % for validation, per class where there are
  classes; where it has a training split but none for validation, 10 % of it become that;
- `limit` keeps the first N of a fixed permutation of each split.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import track
from torch import Tensor

from opsin.data import IGNORE, Split
from opsin.data.images import ImageSource, describe, fit, fit_nearest, read_image, read_mask
from opsin.errors import BadInput

TEST, VAL = 0.2, 0.1
WORTH_A_BAR = 5000  # files
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
T = TypeVar("T")
Size = tuple[int, int]


class Item(NamedTuple):
    """One sample before it is read. target: a class, `Boxes`, or the file of a mask or of the clean image."""

    image: ImageSource
    target: Any = 0


@dataclass
class Listing:
    """What a layout found; no image has been decoded."""

    name: str
    task: str
    splits: dict[str, list[Item]]
    classes: tuple[str, ...] = ()
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignore: int = 255  # of masks: the number that means "no class"
    root: Path = Path()  # where classes.txt of masks lies


@dataclass(frozen=True)
class ReadImage:
    """(image, target as listed)."""

    channels: int
    size: Size | None = None

    def __call__(self, item: Item) -> tuple[Float[Tensor, "c h w"], Any]:
        return read_image(item.image, self.channels, size=self.size), item.target


@dataclass(frozen=True)
class ReadPair:
    """(degraded image, clean image)."""

    channels: int

    def __call__(self, item: Item) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "c H W"]]:
        return read_image(item.image, self.channels), read_image(item.target, self.channels)


@dataclass(frozen=True)
class ReadMasked:
    """(image, mask of classes). `numbers` maps a mask's raw number to its class; others are errors."""

    channels: int
    numbers: dict[int, int]
    size: Size | None = None

    def __call__(self, item: Item) -> tuple[Float[Tensor, "c h w"], Int[Tensor, "h w"]]:
        image, raw = read_image(item.image, self.channels), read_mask(item.target)
        if raw.shape != image.shape[-2:]:
            raise BadInput(
                f"the mask {item.target} is {_by(raw)}, but its image {describe(item.image)} is {_by(image)}"
            )
        mask = self._classes(raw, item.target)
        return (image, mask) if self.size is None else self._fit(image, mask, self.size)

    def _classes(self, raw: Int[Tensor, "h w"], name: Any) -> Int[Tensor, "h w"]:
        found, inverse = torch.unique(raw, return_inverse=True)
        unknown = [n for n in found.tolist() if n not in self.numbers]
        if unknown:
            raise BadInput(f"the mask {name} holds the number {unknown[0]}, which is none of the classes")
        return torch.tensor([self.numbers[n] for n in found.tolist()])[inverse]

    @staticmethod
    def _fit(image: Tensor, mask: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return fit(image, size), fit_nearest(mask, size)


def _by(image: Tensor) -> str:
    return f"{image.shape[-1]} x {image.shape[-2]} pixels"


class Samples:
    """A split whose images are read when asked for.

    Opening a source checks every file's header and end, which is cheap; damage in the middle of a file shows only when
    it is decoded. Such a sample is then replaced by the next readable one, so that training never stops over it, and is
    listed in `skipped` (by the process that read it: with loader workers, theirs).
    """

    def __init__(self, items: Sequence[Item], read: Callable[[Item], tuple[Any, Any]], skipped: list[tuple[str, str]]):
        self.items, self.read, self.skipped = list(items), read, skipped
        self.broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        index = range(len(self))[index]
        for step in range(len(self)):
            place = (index + step) % len(self)
            if place in self.broken:
                continue
            try:
                return self.read(self.items[place])
            except BadInput as error:
                if place not in self.broken:
                    self.broken.add(place)
                    self.skipped.append((describe(self.items[place].image), str(error)))
        raise BadInput(f"none of the {len(self)} images can be read; the first: {self.skipped[-1][1]}")


class Arrays:
    """A split that lies decoded in memory: (N, C, H, W) and classes (N,); `top` is the number that means 1.0.

    `images` and `labels` are there for loops that gather whole batches; item access gives float32 in [0, 1].
    """

    def __init__(self, images: Tensor, labels: Tensor, top: int = 255):
        self.images, self.labels, self.top = images, labels.long(), top

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "c h w"], int]:
        return self.images[index].float() / self.top, int(self.labels[index])

    def batch(self, indices: Int[Tensor, " n"]) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
        """Many samples at once."""
        return self.images[indices].float() / self.top, self.labels[indices]


def permutation(count: int, salt: str = "") -> list[int]:
    """A fixed shuffle of range(count): the same on every machine and with every version of every library."""
    return sorted(range(count), key=lambda i: hashlib.blake2b(f"{salt}/{i}".encode(), digest_size=8).digest())


def divide(labels: Sequence[int], shares: dict[str, float]) -> dict[str, list[int]]:
    """Divides indices by a fixed shuffle within each class; what the shares leave over is "train".

    A class of at least 1 + len(shares) samples has one or more in every split; of a smaller one all are for training.
    """
    parts: dict[str, list[int]] = {"train": [], **{name: [] for name in shares}}
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    for label in sorted(members):
        group = [members[label][i] for i in permutation(len(members[label]), f"split {label}")]
        if len(group) > len(shares):
            for name, share in shares.items():
                count = max(1, round(share * len(members[label])))
                parts[name] += group[:count]
                group = group[count:]
        parts["train"] += group
    return {name: sorted(indices) for name, indices in parts.items() if indices}


def complete(splits: dict[str, list[Item]], task: str) -> dict[str, list[Item]]:
    """Adds the splits that are missing, by the module's rules, in the order train, val, test.

    `splits` with the single name "" is a source without any.
    """
    if "" in splits:
        shares = {"val": VAL} if task == "images" else {"test": TEST, "val": VAL}
        splits = _carve(splits[""], task, shares)
    elif "train" in splits and "val" not in splits:
        splits = {**splits, **_carve(splits["train"], task, {"val": VAL})}
    return {name: splits[name] for name in ("train", "val", "test") if splits.get(name)}


def _carve(items: list[Item], task: str, shares: dict[str, float]) -> dict[str, list[Item]]:
    labels = [item.target if task == "classify" else 0 for item in items]
    return {name: [items[i] for i in part] for name, part in divide(labels, shares).items()}


def first(items: Sequence[T], limit: int | None) -> list[T]:
    """The first `limit` of a fixed permutation, in their original order; all without a limit."""
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise BadInput(f"limit={limit}: a split needs at least one sample")
    return [items[i] for i in sorted(permutation(len(items), "limit")[:limit])]


def in_threads(function: Callable[[Any], T], things: Sequence[Any], what: str = "Reading images") -> list[T]:
    """Maps over files, in blocks: decoding releases the interpreter lock, and a block costs less than 32 hand-overs.

    Work on many files shows a bar on a terminal.
    """
    blocks = [things[start : start + 32] for start in range(0, len(things), 32)]
    hidden = len(things) < WORTH_A_BAR or not sys.stderr.isatty()
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda block: [function(thing) for thing in block], blocks)
        shown = track(results, what, total=len(blocks), console=Console(stderr=True), transient=True, disable=hidden)
        return [result for block in shown for result in block]


def channel_statistics(split: Split, sample: int = 128) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over `sample` images of a split, all pixels weighing alike."""
    if isinstance(split, Arrays):
        images = split.batch(torch.tensor(permutation(len(split), "statistics")[:8192]))[0].double()
        std, mean = torch.std_mean(images, dim=(0, 2, 3), correction=0)
        return tuple(mean.tolist()), tuple(std.tolist())
    chosen = permutation(len(split), "statistics")[:sample]
    in_order = getattr(split, "in_order", False)
    moments = (
        [_moments(split[i][0]) for i in sorted(chosen)]
        if in_order
        else in_threads(lambda i: _moments(split[i][0]), chosen)
    )
    sums = np.array(moments).sum(0)
    count, total, squares = sums[..., 0], sums[..., 1], sums[..., 2]
    mean = total / count
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist())


def _moments(image: Float[Tensor, "c h w"]) -> list[list[float]]:
    flat = image.double().flatten(1)
    ones = torch.full((len(flat),), float(flat.shape[1]), dtype=torch.double)
    return torch.stack([ones, flat.sum(1), flat.square().sum(1)], 1).tolist()


class Crops:
    """Random square crops of a split of photos, `side` pixels of the target; (image, target) of a pair stay aligned.

    Positions follow from index and epoch (`set_epoch`). An image smaller than the crop is mirrored up to its size
    (masks: filled with IGNORE).
    """

    def __init__(self, split: Split, side: int, scale: int = 1):
        if side % scale:
            raise BadInput(f"crop={side}: it must be a multiple of the scale {scale}")
        self.split, self.side, self.scale, self.epoch = split, side, scale, 0
        self.in_order = getattr(split, "in_order", False)

    def set_epoch(self, epoch: int) -> None:
        """Moves the crops, and lets the split below follow."""
        self.epoch = epoch
        if hasattr(self.split, "set_epoch"):
            self.split.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        index = range(len(self))[index]
        image, target = self.split[index]
        side = self.side // self.scale
        image = _at_least(image, side)
        draw = torch.rand(2, generator=generator_of("crop", self.epoch, index))
        top, left = (int(u * (length - side + 1)) for u, length in zip(draw.tolist(), image.shape[-2:]))
        if isinstance(target, Tensor):
            big = _at_least(target, self.side)
            target = _window(big, top * self.scale, left * self.scale, self.side)
        return _window(image, top, left, side), target


def _window(image: Tensor, top: int, left: int, side: int) -> Tensor:
    return image[..., top : top + side, left : left + side]


def _at_least(image: Tensor, side: int) -> Tensor:
    """Extends (C, H, W) or (H, W) to the right and below."""
    down, right = (max(0, side - length) for length in image.shape[-2:])
    if not (down or right):
        return image
    if not image.is_floating_point():
        return torch.nn.functional.pad(image, (0, right, 0, down), value=IGNORE)
    rows, columns = (_mirror(length, length + more) for length, more in zip(image.shape[-2:], (down, right)))
    return image[..., rows[:, None], columns]


def _mirror(length: int, target: int) -> Int[Tensor, " n"]:
    place = torch.arange(target) % (2 * length)
    return torch.where(place < length, place, 2 * length - 1 - place)


def generator_of(*parts: Any) -> torch.Generator:
    """A random state that follows from its arguments."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
