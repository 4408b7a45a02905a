"""Pairs of folders for restoration: a folder of degraded images and one of the clean ones, matched by name.

    degraded/..., clean/...        split/degraded, split/clean        degraded/split, clean/split

with no third folder beside them. Names of the folders: `DEGRADED` and `CLEAN` (e.g. input and target, LR and HR, hazy
and gt). A suffix of the scale in the degraded file's name, as in 0801x4.png, is ignored. The clean image may be larger
by a whole factor.
"""

import re
from pathlib import Path

from opsin.data.folders import images_below, split_folders, subfolders
from opsin.data.splits import Item, Listing
from opsin.errors import BadInput

DEGRADED = (
    "degraded",
    "input",
    "inputs",
    "lr",
    "lq",
    "low",
    "noisy",
    "hazy",
    "haze",
    "rain",
    "rainy",
    "blur",
    "blurry",
)
CLEAN = ("clean", "target", "targets", "hr", "hq", "high", "gt", "groundtruth", "clear", "norain", "sharp", "reference")


def pair_folders(path: Path) -> Listing:
    """Lists the pairs; an image without its partner is skipped and named."""
    listing = Listing(path.name, "restore", {})
    folders = find_pair_folders(path)
    if not folders:
        raise BadInput(
            f"the folder {path} holds no pair of folders; expected are e.g. degraded/ and clean/, input/ and target/, "
            "or lr/ and hr/"
        )
    for split, (degraded, clean) in folders.items():
        listing.splits[split] = _pairs(degraded, clean, listing)
    if not any(listing.splits.values()):
        degraded, clean = next(iter(folders.values()))
        raise BadInput(f"no image in {degraded} has the name of one in {clean}; pairs are matched by their names")
    return listing


def find_pair_folders(path: Path) -> dict[str, tuple[Path, Path]]:
    """split -> (folder of degraded images, folder of clean ones); empty if this is no such layout."""
    both = _both(path)
    if both:
        return {s: (root, both[1] / root.relative_to(both[0])) for s, root in split_folders(both[0]).items()}
    return {split: both for split, root in split_folders(path).items() if split and (both := _both(root))}


def _both(path: Path) -> tuple[Path, Path] | None:
    by_name = {folder.name.lower(): folder for folder in subfolders(path)}
    degraded = next((by_name[name] for name in DEGRADED if name in by_name), None)
    clean = next((by_name[name] for name in CLEAN if name in by_name), None)
    return (degraded, clean) if degraded and clean and len(by_name) == 2 else None


def _pairs(degraded: Path, clean: Path, listing: Listing) -> list[Item]:
    clean_of = {file.relative_to(clean).with_suffix("").as_posix(): file for file in images_below(clean)}
    items, used = [], set()
    for image in images_below(degraded):
        name = image.relative_to(degraded).with_suffix("").as_posix()
        name = name if name in clean_of else re.sub(r"x\d+$", "", name)
        if name in clean_of:
            items.append(Item(image, clean_of[name]))
            used.add(name)
        else:
            listing.skipped.append((str(image), f"it has no partner of the same name in {clean}"))
    alone = [file for name, file in clean_of.items() if name not in used]
    listing.skipped += [(str(file), f"it has no partner of the same name in {degraded}") for file in alone]
    return items
