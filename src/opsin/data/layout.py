"""From a path to the listing of what lies there: which layout it is, and the function that lists it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from opsin.data.boxes import coco, coco_files, pascal_voc, voc_files
from opsin.data.folders import class_folders, flat, images_below, images_in, no_images, split_folders, subfolders
from opsin.data.images import SUFFIXES
from opsin.data.masks import find_folders, image_mask_folders
from opsin.data.named import NAMES, named
from opsin.data.options import Options
from opsin.data.pairs import find_pair_folders, pair_folders
from opsin.data.parquet import parquet
from opsin.data.splits import Listing
from opsin.data.video import VIDEO_SUFFIXES
from opsin.errors import BadInput, UnknownName

LAYOUTS: dict[str, Callable[[Path], Listing]] = {
    "classes": class_folders, "images": flat, "parquet": parquet, "masks": image_mask_folders,
    "coco": coco, "voc": pascal_voc, "pairs": pair_folders,
}  # fmt: skip


def find(source: str | Path, options: Options) -> Listing | Path:
    """The listing of a data set, or the path of a video."""
    path = Path(source).expanduser()
    if str(source) in NAMES:
        return named(str(source))
    if not path.exists():
        if isinstance(source, str) and "/" not in source and not path.suffix:
            raise UnknownName("data set or folder", source, ("digits", *NAMES))
        raise BadInput(f"there is no file or folder {path}")
    if path.is_file() and path.suffix.lower() not in (".parquet", ".json", *VIDEO_SUFFIXES):
        what = (
            "a single image; give the folder that it lies in"
            if path.suffix.lower() in SUFFIXES
            else ("no data set; give a folder, or a .parquet, .json (COCO) or video file")
        )
        raise BadInput(f"the file {path} is {what}")
    kind = options.kind or layout_of(path)
    if path.is_file() and kind not in ("video", "parquet", "coco"):
        raise BadInput(f"the file {path} cannot be opened as kind='{kind}', which is a folder")
    if kind == "video":
        if path.is_dir():
            raise BadInput(f"the folder {path} is no video file; give the file itself")
        return path
    if kind == "coco":
        return coco(path, Path(options.images) if options.images else None)
    return LAYOUTS[kind](path)


def layout_of(path: Path) -> str:
    """The kind of what lies at a path: one of `opsin.data.options.KINDS`. Raises BadInput where there are no images."""
    if path.is_file():
        return {".parquet": "parquet", ".json": "coco"}.get(path.suffix.lower(), "video")
    if any(path.glob("*.parquet")) or any(path.glob("*/*.parquet")):
        return "parquet"
    if coco_files(path):
        return "coco"
    if any(voc_files(path).values()):
        return "voc"
    if find_folders(path):
        return "masks"
    if find_pair_folders(path):
        return "pairs"
    root = next(iter(split_folders(path).values()))
    if not images_below(path):
        raise no_images(path)
    return "images" if images_in(root) or not subfolders(root) else "classes"
