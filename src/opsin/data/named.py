"""Data sets by name: `digits` is built in, the others lie in the folder that the variable OPSIN_DATA names.

| name           | task     | splits                                                                        |
| -------------- | -------- | ----------------------------------------------------------------------------- |
| digits         | classify | 1,797 grey 8x8 digits of scikit-learn; 70 / 10 / 20 % of each class           |
| cifar10        | classify | 45,000 / 5,000 / 10,000 colour 32x32; validation is 10 % of train per class   |
| orl            | classify | 400 grey faces 112x92 of 40 people; 7 / 1 / 2 of each                         |
| camvid         | segment  | road scenes 480x360, 367 / 101 / 233; 11 classes, void is ignored             |
| bccd           | detect   | blood cells 640x480, 205 / 87 / 72; Platelets, RBC, WBC                       |
| bsds500        | images   | natural photos 481x321 and 321x481, 200 / 100 / 200                           |
| set5, set14    | images   | the test photos of super-resolution; test only                                |

Those of the task "images" become restoration data with `degrade=`, as in `open("bsds500", degrade="bicubic:3")`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from opsin.data.boxes import pascal_voc
from opsin.data.folders import class_folders, flat, images_in
from opsin.data.masks import image_mask_folders
from opsin.data.parquet import parquet
from opsin.data.splits import Item, Listing
from opsin.errors import MissingData


class Named(NamedTuple):
    """Where a data set lies below OPSIN_DATA, how to list it, and where people get it."""

    folder: str
    layout: Callable[[Path], Listing]
    origin: str


def _camvid(path: Path) -> Listing:
    listing = image_mask_folders(path)
    listing.ignore = 11
    return listing


def _test_photos(path: Path) -> Listing:
    return Listing(path.name, "images", {"test": [Item(file) for file in images_in(path)]})


NAMED = {
    "cifar10": Named(
        "cifar10", parquet, "train.parquet and test.parquet (image bytes, label) from hf.co/datasets/uoft-cs/cifar10"
    ),
    "orl": Named("orl", class_folders, "s1/1.pgm to s40/10.pgm of the AT&T Laboratories Cambridge database of faces"),
    "camvid": Named("camvid", _camvid, "train/, train_labels/, ... and classes.txt of the 11-class CamVid at 480x360"),
    "bccd": Named("bccd", pascal_voc, "Annotations/, ImageSets/ and JPEGImages/ of github.com/Shenggan/BCCD_Dataset"),
    "bsds500": Named("bsds500", flat, "train/, val/ and test/ of the Berkeley segmentation data set BSDS500"),
    "set5": Named("sr/Set5", _test_photos, "the five high-resolution PNG files of Set5"),
    "set14": Named("sr/Set14", _test_photos, "the fourteen high-resolution PNG files of Set14"),
}
NAMES = ("digits", *NAMED)


def named(name: str) -> Listing:
    """Lists a data set of `NAMED`. Raises MissingData with where to get it."""
    entry = NAMED[name]
    home = os.environ.get("OPSIN_DATA", "")
    path = Path(home, entry.folder)
    if not home:
        raise MissingData(
            f"the data set '{name}' is not on this machine: put {entry.origin} into a folder '{entry.folder}', and "
            "set the variable OPSIN_DATA to the folder above it"
        )
    if not path.is_dir():
        raise MissingData(f"the data set '{name}' is not in {path} (OPSIN_DATA={home}): put {entry.origin} there")
    listing = entry.layout(path)
    listing.name = name
    return listing
