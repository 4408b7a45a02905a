"""COCO's JSON and Pascal VOC's XML."""

import json
from pathlib import Path

import pytest
import torch

import opsin.data
from opsin.errors import BadInput


def coco_content(names=("a.png", "b.png"), prefix: str = "") -> dict:
    return {
        "images": [{"id": 10 + i, "file_name": prefix + n, "width": 16, "height": 12} for i, n in enumerate(names)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [2, 3, 4, 5], "iscrowd": 0},
            {"id": 2, "image_id": 10, "category_id": 3, "bbox": [10, 1, 20, 4]},
            {"id": 3, "image_id": 10, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1},
            {"id": 4, "image_id": 10, "category_id": 3, "bbox": [1, 1, 0, 5]},
        ],
    }  # fmt: skip


def save(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_file(tmp_path, write):
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        write(tmp_path / name, seed=i)
    file = save(tmp_path / "boxes.json", coco_content(names))
    data = opsin.data.open(file)
    assert (data.task, data.classes) == ("detect", ("cat", "dog"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "val": 1, "test": 2}
    found = [split[i][1] for split in data.splits.values() for i in range(len(split))]
    full = [boxes for boxes in found if len(boxes.labels)]
    assert len(full) == 1
    assert torch.equal(full[0].boxes, torch.tensor([[2.0, 3, 6, 8], [10, 1, 16, 5]]))  # the second one is clipped
    assert full[0].labels.tolist() == [1, 0]
    assert found[0].boxes.shape[1] == 4 and sum(len(b.labels) == 0 for b in found) == 9
    assert [("no area" in reason, Path(name).name) for name, reason in data.skipped] == [(True, "0.png")]


@pytest.mark.parametrize("layout", ["coco2017", "roboflow", "flat"])
def test_coco_folders(tmp_path, write, layout):
    for split, year in (("train", "2017"), ("val", "2017")):
        images = {"coco2017": tmp_path / f"{split}{year}", "roboflow": tmp_path / split, "flat": tmp_path / "images"}[
            layout
        ]
        file = {
            "coco2017": tmp_path / "annotations" / f"instances_{split}{year}.json",
            "roboflow": tmp_path / split / "_annotations.coco.json", "flat": tmp_path / f"{split}.json",
        }[layout]  # fmt: skip
        names = [f"{split}{i}.png" for i in range(3 if split == "train" else 2)]
        for name in names:
            write(images / name)
        save(file, coco_content(names))
    data = opsin.data.open(tmp_path)
    assert data.task == "detect"
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3, "val": 2}
    assert len(data.train[0][1].labels) == 2


def test_coco_with_its_images_elsewhere(tmp_path, write):
    for name in ("a.png", "b.png"):
        write(tmp_path / "photos" / name)
    file = save(tmp_path / "notes" / "boxes.json", coco_content())
    with pytest.raises(BadInput, match=r"name the image 'a\.png', which is not in .*images="):
        opsin.data.open(file)
    assert len(opsin.data.open(file, images=tmp_path / "photos").train) == 2


BAD_COCO = {
    "text": ("{", "cannot be read"),
    "list": ([], "'images' is missing"),
    "no categories": ({"images": [], "annotations": []}, "'categories'"),
    "unknown category": (coco_content() | {"categories": [{"id": 7, "name": "dog"}]}, "not in COCO's layout"),
    "no box": (coco_content() | {"annotations": [{"image_id": 10, "category_id": 3}]}, "not in COCO's layout"),
    "short box": (coco_content() | {"annotations": [{"image_id": 10, "category_id": 3, "bbox": [1]}]}, "not in COCO's"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD_COCO))
def test_bad_coco_is_named(case, tmp_path, write):
    for name in ("a.png", "b.png"):
        write(tmp_path / name)
    content, words = BAD_COCO[case]
    with pytest.raises(BadInput) as error:
        opsin.data.open(save(tmp_path / "boxes.json", content))
    assert words in str(error.value) and "boxes.json" in str(error.value) and "\n" not in str(error.value)


def voc(name: str, objects: str = "") -> str:
    return (
        f"<annotation><filename>{name}</filename><size><width>16</width><height>12</height><depth>3</depth></size>"
        f"{objects}</annotation>"
    )


def voc_object(name: str, *corners: int) -> str:
    tags = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), corners))
    return f"<object><name>{name}</name><bndbox>{tags}</bndbox></object>"


def voc_set(root: Path, write, count: int = 10) -> Path:
    for i in range(count):
        write(root / "JPEGImages" / f"{i}.png", seed=i)
        two = voc_object("dog", 1, 1, 16, 12) + voc_object("cat", 3, 4, 8, 20)
        objects = two if i == 0 else voc_object("dog", 2, 2, 3, 3)
        save(root / "Annotations" / f"{i}.xml", voc(f"{i}.png", objects))
    return root


def test_voc_with_lists(tmp_path, write):
    voc_set(tmp_path, write)
    for split, numbers in (("train", "0\n1\n2\n"), ("val", "3 1\n4 -1\n"), ("test", "5\n")):
        save(tmp_path / "ImageSets" / "Main" / f"{split}.txt", numbers)
    data = opsin.data.open(tmp_path)
    assert (data.task, data.classes, data.size) == ("detect", ("cat", "dog"), (12, 16))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 3, "val": 2, "test": 1}
    boxes = data.train[0][1]
    assert torch.equal(boxes.boxes, torch.tensor([[0.0, 0, 16, 12], [2, 3, 8, 12]]))
    assert boxes.labels.tolist() == [1, 0]


def test_voc_without_lists_and_beside_the_images(tmp_path, write):
    data = opsin.data.open(voc_set(tmp_path / "one", write))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 7, "val": 1, "test": 2}
    for split in ("train", "test"):
        for i in range(10):
            write(tmp_path / "two" / split / f"{split}{i}.png", seed=i)
            save(tmp_path / "two" / split / f"{split}{i}.xml", voc(f"{split}{i}.png", voc_object("dog", 2, 2, 9, 9)))
    data = opsin.data.open(tmp_path / "two")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 9, "val": 1, "test": 10}


def test_bad_voc_is_named(tmp_path, write):
    root = voc_set(tmp_path, write)
    (root / "JPEGImages" / "3.png").unlink()
    with pytest.raises(BadInput, match=r"3\.xml name the image '3\.png', which is not there"):
        opsin.data.open(root)
    whole = voc("3.png", voc_object("dog", 1, 2, 3, 4))
    for content, words in (
        ("<annotation", "not in Pascal VOC"),
        (whole.replace("xmax", "right"), "<xmax> is missing"),
        (whole.replace("dog", ""), "<name> is missing"),
        (whole.replace("<xmax>3", "<xmax>x"), "could not convert"),
    ):
        save(root / "Annotations" / "3.xml", content)
        with pytest.raises(BadInput, match=words) as error:
            opsin.data.open(root)
        assert "3.xml" in str(error.value) and "\n" not in str(error.value)
    save(root / "ImageSets" / "Main" / "train.txt", "nothere\n")
    with pytest.raises(BadInput, match="'nothere', which has no XML"):
        opsin.data.open(root)


def test_options_that_do_not_fit(tmp_path, write):
    with pytest.raises(BadInput, match="size=8 does not apply"):
        opsin.data.open(voc_set(tmp_path, write), size=8)


def test_unreadable_images_are_skipped(tmp_path, write):
    root = voc_set(tmp_path, write)
    (root / "JPEGImages" / "3.png").write_bytes(b"")
    data = opsin.data.open(root)
    assert [Path(name).name for name, _ in data.skipped] == ["3.png"]
    assert sum(map(len, data.splits.values())) == 9
