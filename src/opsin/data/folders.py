"""Folders of images: one folder per class, or no classes at all; with or without train, val and test folders above."""

import os
from pathlib import Path

from opsin.data.images import SUFFIXES
from opsin.data.splits import SPLIT_NAMES, Item, Listing
from opsin.errors import BadInput


def class_folders(path: Path) -> Listing:
    """`[split/]class/**/image`: the classes are the folders' names, sorted as text."""
    roots = split_folders(path)
    classes = sorted({folder.name for root in roots.values() for folder in subfolders(root) if images_below(folder)})
    if not classes:
        raise BadInput(f"the folder {path} holds no class folders with images; one folder per class is expected")
    if len(classes) == 1:
        raise BadInput(
            f"the folder {path} holds one class only ('{classes[0]}'); put the images of each class into a folder of "
            "its own, or open it with kind='images' if they have no labels"
        )
    number = {name: index for index, name in enumerate(classes)}
    splits = {
        split: [Item(file, number[name]) for name in classes for file in images_below(root / name)]
        for split, root in roots.items()
    }
    return Listing(path.name, "classify", splits, tuple(classes))


def flat(path: Path) -> Listing:
    """`[split/]**/image`, without labels."""
    splits = {split: [Item(file) for file in images_below(root)] for split, root in split_folders(path).items()}
    if not any(splits.values()):
        raise no_images(path)
    return Listing(path.name, "images", splits)


def split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits by their canonical names, or {"": path} if there are none."""
    found = {SPLIT_NAMES[f.name.lower()]: f for f in subfolders(path) if f.name.lower() in SPLIT_NAMES}
    alone = bool(found) and len(found) == len(subfolders(path))
    return found if len(found) > 1 or alone else {"": path}  # one of them beside others is a class called "train"


def subfolders(path: Path) -> list[Path]:
    """Sorted; hidden ones are left out."""
    return sorted(f for f in path.iterdir() if f.is_dir() and not f.name.startswith(".")) if path.is_dir() else []


def images_in(path: Path) -> list[Path]:
    """The image files directly in a folder, sorted."""
    if not path.is_dir():
        return []
    return sorted(f for f in path.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))


def images_below(path: Path) -> list[Path]:
    """The image files in a folder and all below it, sorted."""
    found: list[Path] = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        wanted = (n for n in names if Path(n).suffix.lower() in SUFFIXES and not n.startswith("."))
        found += [Path(folder, name) for name in wanted]
    return sorted(found)


def no_images(path: Path) -> BadInput:
    return BadInput(f"the folder {path} holds no images ({', '.join(sorted(SUFFIXES))})")
