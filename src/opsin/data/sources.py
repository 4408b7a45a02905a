"""`open_source`: from a name or a path to `Data`, whatever the layout.

1. The layout is found from the path, or given by `kind=`, and lists its items (`opsin.data.layout`).
2. Missing splits are carved out of the others, and `limit` shortens them (`opsin.data.splits` has the rules).
3. Every file's header and end are checked; what cannot be read is left out and listed (`opsin.data.survey`).
4. Labelled images of one small size are decoded once into memory; everything else is read when asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opsin.data import Data, Split
from opsin.data.degrade import Degradation, Degraded, degradation
from opsin.data.images import as_float, fit, read_array
from opsin.data.layout import find
from opsin.data.masks import mask_classes
from opsin.data.options import Options
from opsin.data.splits import (
    Arrays,
    Crops,
    Item,
    Listing,
    ReadImage,
    ReadMasked,
    ReadPair,
    Samples,
    channel_statistics,
    complete,
    divide,
    first,
    in_threads,
)
from opsin.data.survey import survey
from opsin.data.video import Frames
from opsin.errors import BadInput

ARRAY_BYTES = 2 * 1024**3  # of all splits together
ARRAY_SIDE = 96


def open_source(source: str | Path, **options: Any) -> Data:
    """Opens a data set by name (`opsin.data.named`) or path ("./digits" is a folder, "digits" the name).

    Options: see `opsin.data.options.Options`. Raises BadInput (path, layout, option), UnknownName (kind, option,
    data set), MissingData (a named set that is not here).
    """
    chosen = Options.of(options)
    degrade = degradation(chosen.degrade) if chosen.degrade else None
    if str(source) == "digits":
        data = _digits(chosen)
    else:
        found = find(source, chosen)
        data = _video(found, chosen) if isinstance(found, Path) else _build(found, chosen)
    if degrade:
        data = _degraded(data, degrade)
    if chosen.crop:
        data = _cropped(data, chosen.crop)
    data.mean, data.std = channel_statistics(data.splits.get("train", next(iter(data.splits.values()))))
    return data


def _build(listing: Listing, options: Options) -> Data:
    """Steps 2 to 4 of the module's list."""
    if options.size and listing.task in ("detect", "restore"):
        raise BadInput(
            f"size={options.size!r} does not apply to the task '{listing.task}', which keeps its images' size"
        )
    numbers: dict[int, int] = {}
    if listing.task == "segment":
        masks = [item.target for items in listing.splits.values() for item in items]
        ignore = options.ignore if options.ignore is not None else listing.ignore
        listing.classes, numbers = mask_classes(listing.root, masks, ignore)
    splits = complete(listing.splits, listing.task)
    seen = survey({name: first(items, options.limit) for name, items in splits.items()}, listing)
    channels = options.channels or (1 if seen.grey else 3)
    data = Data(
        listing.name, listing.task, {}, listing.classes, channels, options.shape or seen.size,
        skipped=listing.skipped, scale=seen.scale,
    )  # fmt: skip
    if _fits_in_memory(data, seen.splits):
        decoded = {name: _decoded(items, data, options) for name, items in seen.splits.items()}
        data.splits = {name: arrays for name, arrays in decoded.items() if arrays is not None}
        if not data.splits:
            raise BadInput(f"no image of the data set {data.name} can be read; the first: {data.skipped[0][1]}")
        return data
    read: Callable[[Item], tuple[Any, Any]] = ReadImage(channels, options.shape)
    if data.task == "segment":
        read = ReadMasked(channels, numbers, options.shape)
    elif data.task == "restore":
        read = ReadPair(channels)
    data.splits = {name: Samples(items, read, data.skipped) for name, items in seen.splits.items()}
    return data


def _fits_in_memory(data: Data, splits: dict[str, list[Item]]) -> bool:
    if data.task != "classify" or data.size is None or max(data.size) > ARRAY_SIDE:
        return False
    return sum(map(len, splits.values())) * data.channels * data.size[0] * data.size[1] <= ARRAY_BYTES


def _decoded(items: list[Item], data: Data, options: Options) -> Arrays | None:
    """Decodes a split; what turns out to be damaged is left out and listed. None if nothing is left."""

    def decode(item: Item) -> torch.Tensor | str:
        try:
            return read_array(item.image, data.channels, size=options.shape)
        except BadInput as error:
            return str(error)

    results = in_threads(decode, items, "Decoding images")
    data.skipped += [(str(item.image), r) for item, r in zip(items, results) if isinstance(r, str)]
    pairs = [(item.target, image) for item, image in zip(items, results) if isinstance(image, torch.Tensor)]
    if not pairs:
        return None
    images, labels = [image for _, image in pairs], torch.tensor([label for label, _ in pairs])
    if all(image.dtype == torch.uint8 for image in images):
        return Arrays(torch.stack(images), labels)
    return Arrays(torch.stack([as_float(image) for image in images]), labels, top=1)


def _digits(options: Options) -> Data:
    """scikit-learn's 1,797 grey digits of 8x8 pixels, 0 to 16."""
    from sklearn.datasets import load_digits

    if options.kind:
        raise BadInput(f"kind='{options.kind}' does not apply to the built-in digits; write ./digits for a folder")
    raw = load_digits()
    channels, size = options.channels or 1, options.shape or (8, 8)
    images = torch.from_numpy(raw.images).byte()[:, None].expand(-1, channels, -1, -1)
    labels = torch.from_numpy(raw.target)
    top = 16
    if size != (8, 8):
        images = torch.stack([fit((image.float() / 16), size) for image in images]).mul(255).round().byte()
        top = 255
    parts = divide(labels.tolist(), {"test": 0.2, "val": 0.1})
    kept = {name: torch.tensor(first(parts[name], options.limit)) for name in ("train", "val", "test")}
    splits = {name: Arrays(images[indices].contiguous(), labels[indices], top) for name, indices in kept.items()}
    return Data("digits", "classify", dict(splits), tuple(map(str, range(10))), channels, size)


def _video(path: Path, options: Options) -> Data:
    if options.size:
        raise BadInput(f"size={options.size!r} does not apply to a video; its frames keep their size")
    frames = Frames(path, options.channels or 3, options.stride)
    if options.limit:
        frames.stamps = frames.stamps[: options.limit]
    height, width = frames[0][0].shape[-2:]
    return Data(path.stem, "images", {"train": frames}, channels=frames.channels, size=(height, width))


def _degraded(data: Data, degrade: Degradation) -> Data:
    """Restoration data of a source's images, whatever its labels."""
    if data.task == "restore":
        raise BadInput(f"degrade= does not apply to {data.name}, whose images are degraded already; pass clean ones")
    size = data.size and (data.size[0] // degrade.scale, data.size[1] // degrade.scale)
    if size and min(size) < 1:
        raise BadInput(f"the images of {data.name} are too small for a scale of {degrade.scale}")
    splits: dict[str, Split] = {name: Degraded(split, degrade) for name, split in data.splits.items()}
    return replace(data, task="restore", splits=splits, classes=(), size=size, scale=degrade.scale)


def _cropped(data: Data, side: int) -> Data:
    if data.task in ("classify", "detect") or "train" not in data.splits:
        what = f"the task '{data.task}'" if "train" in data.splits else f"{data.name}, which has no training split"
        raise BadInput(f"crop={side} does not apply to {what}; leave it out")
    cropped = Crops(data.splits["train"], side, data.scale)
    return replace(data, splits={**data.splits, "train": cropped}, size=(side // data.scale, side // data.scale))
