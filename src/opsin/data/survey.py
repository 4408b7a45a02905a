"""The check at opening: every file's header, and whether its end is there.

It takes about 0.1 ms per file, so that 50,000 photos open in seconds; files whose end is missing are decoded to know.
What cannot be read, or does not fit its mask or partner, is left out and listed with the reason. Damage in the middle
of a file is found when it is decoded: see `opsin.data.splits.Samples`.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from opsin.data.images import Header, read_header
from opsin.data.parquet import Row
from opsin.data.splits import Item, Listing, in_threads
from opsin.errors import BadInput

CHECKED_OF_LARGE = 256  # rows per split of a table that is not held in memory


@dataclass(frozen=True)
class Survey:
    """The items that are sound; whether all are grey; their common (height, width); target size over image size."""

    splits: dict[str, list[Item]]
    grey: bool
    size: tuple[int, int] | None
    scale: int


def survey(splits: dict[str, list[Item]], listing: Listing) -> Survey:
    """Checks the items. Raises BadInput if no image is left."""
    items = {name: _to_check(part) for name, part in splits.items()}
    flat = [item for part in items.values() for item in part]
    results = dict(zip(map(id, flat), in_threads(_check, flat, "Checking images")))
    found = {key: result for key, result in results.items() if not isinstance(result, str)}
    scale = _scale(found.values()) if listing.task == "restore" else 1
    reasons = {key: result for key, result in results.items() if isinstance(result, str)}
    reasons |= {key: reason for key, (image, target) in found.items() if (reason := _misfit(image, target, scale))}
    listing.skipped += [(str(item.image), reasons[id(item)]) for item in flat if id(item) in reasons]
    kept = {name: [item for item in part if id(item) not in reasons] for name, part in splits.items()}
    if not any(kept.values()):
        first = f"; the first: {listing.skipped[0][1]}" if listing.skipped else ""
        raise BadInput(f"the data set {listing.name} holds no image that can be used{first}")
    headers = [image for key, (image, _) in found.items() if key not in reasons]
    sizes = {header.size for header in headers}
    grey = all(header.grey for header in headers)
    return Survey(
        {name: part for name, part in kept.items() if part}, grey, sizes.pop() if len(sizes) == 1 else None, scale
    )


def _to_check(items: list[Item]) -> list[Item]:
    large = bool(items) and isinstance(items[0].image, Row) and items[0].image.shard.rows is None
    return items[:CHECKED_OF_LARGE] if large else items


def _check(item: Item) -> tuple[Header, Header | None] | str:
    try:
        return read_header(item.image), read_header(item.target) if isinstance(item.target, Path) else None
    except BadInput as error:
        return str(error)


def _scale(found: Iterable[tuple[Header, Header | None]]) -> int:
    """The most common ratio of the clean image's height to the degraded one's, as a whole number."""
    ratios = Counter(round(target.size[0] / image.size[0]) for image, target in found if target)
    return max(1, ratios.most_common(1)[0][0]) if ratios else 1


def _misfit(image: Header, target: Header | None, scale: int) -> str:
    if target is None or target.size == (image.size[0] * scale, image.size[1] * scale):
        return ""
    (h, w), (height, width) = image.size, target.size
    times = f"{scale} times " if scale > 1 else ""
    return f"it is {w} x {h} pixels, and its mask or clean image {width} x {height}, not {times}the same"
