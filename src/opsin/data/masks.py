"""Image + mask folders for segmentation.

Any of these, with the files matched by name without suffix (`images` may be called JPEGImages or imgs; `masks` may be
labels, labelmaps, annotations, gt, or SegmentationClass):

    images/..., masks/...          [split/]images/..., masks/...
    images/split/..., masks/split/...          split/..., split_labels/...  (or split_masks)

A mask is an index image. The classes come from classes.txt beside the folders (one name per line, numbered from 0;
in a line that holds the word "ignore" the name counts for nothing and its number is ignored), else from the numbers
that the masks hold, all of which are read then; masks of 0 and 255 only are two classes.
"""

from pathlib import Path

from opsin.data import IGNORE
from opsin.data.folders import images_below, split_folders, subfolders
from opsin.data.images import read_mask
from opsin.data.splits import SPLIT_NAMES, Item, Listing, in_threads
from opsin.errors import BadInput

IMAGES = ("images", "imgs", "jpegimages", "image")
MASKS = ("masks", "labels", "labelmaps", "annotations", "gt", "segmentationclass", "mask", "label")
ENDINGS = ("_labels", "_masks", "_label", "_mask", "labels", "annot")


def image_mask_folders(path: Path) -> Listing:
    """Lists the pairs; an image without its mask (or the reverse) is skipped and named."""
    listing = Listing(path.name, "segment", {}, root=path)
    folders = find_folders(path)
    if not folders:
        raise BadInput(
            f"the folder {path} holds no image and mask folders; expected are images/ and masks/, or train/ and "
            "train_labels/"
        )
    for split, (images, masks) in folders.items():
        listing.splits[split] = _pairs(images, masks, listing)
    if not any(listing.splits.values()):
        images, masks = next(iter(folders.values()))
        raise BadInput(f"no mask in {masks} has the name of an image in {images}; they are matched by their names")
    return listing


def find_folders(path: Path) -> dict[str, tuple[Path, Path]]:
    """split -> (folder of images, folder of masks); empty if this is no such layout."""
    both = _both(path)
    if both:
        inner = split_folders(both[0])
        return {split: (root, both[1] / root.relative_to(both[0])) for split, root in inner.items()}
    found = {split: both for split, root in split_folders(path).items() if split and (both := _both(root))}
    if found:
        return found
    by_name = {folder.name.lower(): folder for folder in subfolders(path)}
    return {
        split: (by_name[name], by_name[name + ending])
        for name, split in SPLIT_NAMES.items()
        for ending in ENDINGS
        if name in by_name and name + ending in by_name
    }


def _both(path: Path) -> tuple[Path, Path] | None:
    by_name = {folder.name.lower(): folder for folder in subfolders(path)}
    images = next((by_name[name] for name in IMAGES if name in by_name), None)
    masks = next((by_name[name] for name in MASKS if name in by_name and images_below(by_name[name])), None)
    if masks and not images and set(by_name) <= set(MASKS):
        raise BadInput(f"the folder {path} holds masks ({masks.name}/) but no images; put them into {path / 'images'}")
    return (images, masks) if images and masks else None


def _pairs(images: Path, masks: Path, listing: Listing) -> list[Item]:
    mask_of = {file.relative_to(masks).with_suffix("").as_posix(): file for file in images_below(masks)}
    items = []
    for image in images_below(images):
        mask = mask_of.pop(image.relative_to(images).with_suffix("").as_posix(), None)
        if mask is None:
            listing.skipped.append((str(image), f"it has no mask of the same name in {masks}"))
        else:
            items.append(Item(image, mask))
    listing.skipped += [(str(mask), f"it has no image of the same name in {images}") for mask in mask_of.values()]
    return items


def mask_classes(path: Path, masks: list[Path], ignore: int = IGNORE) -> tuple[tuple[str, ...], dict[int, int]]:
    """The classes' names, and the class of each raw number (see the module's rules)."""
    file = path / "classes.txt"
    if file.is_file():
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        kept = [index for index, line in enumerate(lines) if "ignore" not in line.lower()]
        numbers = {index: IGNORE for index in range(len(lines))} | {index: i for i, index in enumerate(kept)}
        return tuple(lines[index] for index in kept), numbers | {ignore: IGNORE, IGNORE: IGNORE}
    found = sorted(set().union(*in_threads(_numbers, masks)))
    if set(found) == {0, 255}:
        return ("0", "1"), {0: 0, 255: 1}
    top = max((number for number in found if number not in (ignore, IGNORE)), default=-1)
    if top < 1:
        raise BadInput(f"the masks of {path} hold one class only; a segmentation needs at least two")
    names = tuple(str(number) for number in range(top + 1))
    return names, {n: n for n in range(top + 1)} | {ignore: IGNORE, IGNORE: IGNORE}


def _numbers(mask: Path) -> set[int]:
    try:
        return set(read_mask(mask).unique().tolist())
    except BadInput:
        return set()  # it is skipped, and named, when the pairs are checked
