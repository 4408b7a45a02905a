"""Boxes: COCO's JSON and Pascal VOC's XML.

Both become `Boxes` with corners x0, y0, x1, y1 in pixels counted from the image's top left corner, clipped to the
image; boxes without area are left out and listed. COCO gives x, y, width, height; crowds are left out. VOC gives
1-based pixels, both inclusive, so one is taken off xmin and ymin. Classes: COCO's categories by their ids, VOC's by
name.
"""

import json
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from opsin.data import Boxes
from opsin.data.folders import images_below, split_folders, subfolders
from opsin.data.splits import SPLIT_NAMES, Item, Listing
from opsin.errors import BadInput

Corners = tuple[float, float, float, float]


def coco(path: Path, images: Path | None = None) -> Listing:
    """A COCO file, or a folder with annotations/*.json or split/_annotations.coco.json.

    images: the folder that the file names refer to; by default the JSON's own, or images/, or the split's beside it.
    """
    files = coco_files(path)
    if not files:
        raise BadInput(f"the folder {path} holds no COCO annotations; pass the .json file itself")
    listing = Listing(path.stem, "detect", {})
    contents = {split: _read_json(file) for split, file in files.items()}
    categories = {c["id"]: str(c["name"]) for content in contents.values() for c in content["categories"]}
    order = sorted(categories)
    listing.classes = tuple(categories[number] for number in order)
    for split, content in contents.items():
        roots = [images] if images else _image_roots(files[split], split)
        listing.splits[split] = _coco_items(content, files[split], roots, order, listing)
    return listing


def coco_files(path: Path) -> dict[str, Path]:
    """split -> JSON file; the split "" for a single file without a split's name."""
    if path.is_file():
        return {"": path}
    inner = {s: f for s, root in split_folders(path).items() for f in sorted(root.glob("_annotations.coco.json"))}
    if inner:
        return inner
    found = [*path.glob("annotations/instances*.json"), *(f for f in path.glob("*.json") if _looks_like_coco(f))]
    return {_split(file): file for file in sorted(found or path.glob("annotations/*.json"), reverse=True)}


def _looks_like_coco(file: Path) -> bool:
    with file.open("rb") as stream:
        start = stream.read(65536)
    return b'"images"' in start or b'"annotations"' in start


def _split(file: Path) -> str:
    words = file.stem.lower().replace("-", "_").split("_")
    return next((SPLIT_NAMES[w] for word in words if (w := word.rstrip("0123456789")) in SPLIT_NAMES), "")


def _image_roots(file: Path, split: str) -> list[Path]:
    homes = [file.parent, file.parent.parent] if file.parent.name == "annotations" else [file.parent]
    named = [f for home in homes for f in subfolders(home) if _split(f) == split or f.name.lower() in ("images",)]
    nested = [f for folder in named for f in subfolders(folder) if _split(f) == split]
    return [*homes, *named, *nested]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"the annotations {file} cannot be read: {' '.join(str(error).split())[:120]}") from error
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content]
    if missing:
        raise BadInput(f"the annotations {file} are not in COCO's layout: '{missing[0]}' is missing")
    return content


def _coco_items(
    content: dict[str, Any], file: Path, roots: list[Path], order: list[int], listing: Listing
) -> list[Item]:
    objects: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    number = {category: index for index, category in enumerate(order)}
    items = []
    try:
        for record in content["annotations"]:
            if not record.get("iscrowd", 0):
                objects[record["image_id"]].append(record)
        for record in sorted(content["images"], key=lambda r: r["file_name"]):
            image = _find(record["file_name"], roots, file)
            found = []
            for o in objects[record["id"]]:
                x, y, width, height = o["bbox"]
                found.append(((x, y, x + width, y + height), number[o["category_id"]]))
            size = record.get("width", float("inf")), record.get("height", float("inf"))
            items.append(Item(image, _boxes(found, size, image, listing)))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"the annotations {file} are not in COCO's layout: bad or missing {error}") from error
    return items


def pascal_voc(path: Path) -> Listing:
    """Annotations/*.xml with JPEGImages/ and ImageSets/Main/*.txt, or XML files beside the images in split folders."""
    splits = voc_files(path)
    if not any(splits.values()):
        raise BadInput(f"the folder {path} holds no Pascal VOC annotations (.xml files)")
    listing = Listing(path.name, "detect", {})
    parsed = {split: [(file, *_read_xml(file)) for file in files] for split, files in splits.items()}
    found = {name for part in parsed.values() for *_, objects in part for name, _ in objects}
    listing.classes = tuple(sorted(found))
    number = {name: index for index, name in enumerate(listing.classes)}
    images = {file.name: file for file in images_below(path)} | {file.stem: file for file in images_below(path)}
    for split, part in parsed.items():
        listing.splits[split] = [
            Item(image, _boxes([(corners, number[n]) for n, corners in objects], size, image, listing))
            for file, name, size, objects in part
            for image in [_voc_image(images, name, file)]
        ]
    return listing


def voc_files(path: Path) -> dict[str, list[Path]]:
    """split -> XML files."""
    folder = path / "Annotations"
    if not folder.is_dir():
        return {split: sorted(root.rglob("*.xml")) for split, root in split_folders(path).items()}
    lists = {s: path / "ImageSets" / "Main" / f"{s}.txt" for s in ("train", "val", "test")}
    lists = {split: file for split, file in lists.items() if file.is_file()}
    if not lists:
        return {"": sorted(folder.glob("*.xml"))}
    names = {split: [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
             for split, file in lists.items()}  # fmt: skip
    missing = [n for part in names.values() for n in part if not (folder / f"{n}.xml").is_file()]
    if missing:
        raise BadInput(f"the lists of {path / 'ImageSets' / 'Main'} name '{missing[0]}', which has no XML in {folder}")
    return {split: [folder / f"{name}.xml" for name in part] for split, part in names.items()}


def _voc_image(images: dict[str, Path], name: str, file: Path) -> Path:
    image = images.get(name) or images.get(file.stem)
    if image is None:
        raise BadInput(f"the annotations {file} name the image '{name}', which is not there")
    return image


def _read_xml(file: Path) -> tuple[str, tuple[float, float], list[tuple[str, Corners]]]:
    """File name of the image, its (width, height), and the objects."""
    try:
        root = ET.parse(file).getroot()
        objects = []
        for node in root.iter("object"):
            box = node.find("bndbox")
            x0, y0, x1, y1 = (float(_text(box, tag)) for tag in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((_text(node, "name"), (x0 - 1, y0 - 1, x1, y1)))
        size = root.find("size")
        known = (float(_text(size, "width")), float(_text(size, "height"))) if size is not None else (0.0, 0.0)
        return _text(root, "filename"), known if min(known) > 0 else (float("inf"), float("inf")), objects
    except (OSError, ValueError, ET.ParseError) as error:
        raise BadInput(f"the annotations {file} are not in Pascal VOC's layout: {error}") from error


def _text(node: ET.Element | None, tag: str) -> str:
    text = node.findtext(tag) if node is not None else None
    if not text:
        raise ValueError(f"<{tag}> is missing")
    return text.strip()


def _find(name: str, roots: list[Path], file: Path) -> Path:
    """The image of that name in the first of the folders that has it."""
    for root in roots:
        if (root / name).is_file():
            return root / name
    raise BadInput(
        f"the annotations {file} name the image '{name}', which is not in {roots[0]}; pass its folder (images=)"
    )


def _boxes(found: list[tuple[Corners, int]], size: tuple[float, float], image: Path, listing: Listing) -> Boxes:
    """Clipped to an image of (width, height)."""
    kept, labels = [], []
    for (x0, y0, x1, y1), label in found:
        x0, x1 = max(0.0, x0), min(size[0], x1)
        y0, y1 = max(0.0, y0), min(size[1], y1)
        if x1 > x0 and y1 > y0:
            kept.append((x0, y0, x1, y1))
            labels.append(label)
        else:
            listing.skipped.append((str(image), f"one of its boxes ({listing.classes[label]}) has no area"))
    return Boxes(torch.tensor(kept, dtype=torch.float32).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64))
