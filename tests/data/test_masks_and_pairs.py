"""Image + mask folders, pairs of folders, clean folders with a degradation, and crops."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opsin.data
from opsin.data import IGNORE, Subset
from opsin.data.splits import Crops
from opsin.errors import BadInput

MASK = np.tile(np.array([[0, 1, 2, 255]]), (12, 4))


def masked_set(images: Path, masks: Path, write, write_mask, count: int = 10, mask: np.ndarray = MASK) -> None:
    for i in range(count):
        write(images / f"{i}.png", seed=i)
        write_mask(masks / f"{i}.png", np.roll(mask, i, 1))


LAYOUTS = {
    "folders": lambda r, s: (r / "images", r / "masks"),
    "split above": lambda r, s: (r / s / "images", r / s / "masks"),
    "split below": lambda r, s: (r / "images" / s, r / "annotations" / s),
    "split beside": lambda r, s: (r / s, r / f"{s}_labels"),
    "voc names": lambda r, s: (r / "JPEGImages", r / "SegmentationClass"),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_mask_layouts(layout, tmp_path, write, write_mask):
    for split, count in (("train", 10), ("test", 3)):
        masked_set(*LAYOUTS[layout](tmp_path, split), write, write_mask, count)
    data = opsin.data.open(tmp_path)
    lengths = {name: len(split) for name, split in data.splits.items()}
    assert lengths == ({"train": 9, "val": 1, "test": 3} if "split" in layout else {"train": 7, "val": 1, "test": 2})
    assert (data.task, data.classes, data.size) == ("segment", ("0", "1", "2"), (12, 16))
    for split in data.splits.values():
        for i in range(len(split)):
            image, mask = split[i]
            number = int(Path(split.items[i].image).stem)
            assert torch.equal(mask, torch.from_numpy(np.roll(MASK, number, 1)))
            assert mask.dtype == torch.int64 and image.shape == (3, 12, 16)


def test_classes_from_a_file(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask, mask=np.tile([[0, 1, 2, 3]], (12, 4)))
    (tmp_path / "classes.txt").write_text("sky\nvoid (ignored)\nroad\ncar\n")
    data = opsin.data.open(tmp_path)
    assert data.classes == ("sky", "road", "car")
    assert set(data.train[0][1].unique().tolist()) == {0, 1, 2, IGNORE}
    number = int(Path(data.train.items[0].image).stem)
    expected = np.roll(np.tile([[0, IGNORE, 1, 2]], (12, 4)), number, 1)
    assert torch.equal(data.train[0][1], torch.from_numpy(expected))


def test_another_number_can_be_ignored(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask)
    data = opsin.data.open(tmp_path, ignore=2)
    assert data.classes == ("0", "1")
    assert set(data.train[0][1].unique().tolist()) == {0, 1, IGNORE}


def test_black_and_white_masks_are_two_classes(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask, mask=np.tile([[0, 255]], (12, 8)))
    data = opsin.data.open(tmp_path)
    assert data.classes == ("0", "1") and set(data.train[0][1].unique().tolist()) == {0, 1}


def test_size_brings_images_and_masks_along(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask)
    image, mask = opsin.data.open(tmp_path, size=(12, 8)).train[0]
    whole, whole_mask = opsin.data.open(tmp_path).train[0]
    assert torch.equal(image, whole[..., 4:12]) and torch.equal(mask, whole_mask[:, 4:12])


def test_masks_that_do_not_fit_are_skipped_and_named(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask)
    write(tmp_path / "images" / "alone.png")
    write_mask(tmp_path / "masks" / "lonely.png", MASK)
    write(tmp_path / "images" / "small.png", size=(5, 5))
    write_mask(tmp_path / "masks" / "small.png", MASK)
    (tmp_path / "masks" / "3.png").write_bytes(b"")
    data = opsin.data.open(tmp_path)
    reasons = {Path(name).name: reason for name, reason in data.skipped}
    assert set(reasons) == {"alone.png", "lonely.png", "small.png", "3.png"}
    assert "no mask" in reasons["alone.png"] and "no image" in reasons["lonely.png"]
    assert "5 x 5" in reasons["small.png"] and "empty" in reasons["3.png"]
    assert sum(map(len, data.splits.values())) == 9


def test_a_number_beyond_the_classes_is_skipped_and_named(tmp_path, write, write_mask):
    masked_set(tmp_path / "images", tmp_path / "masks", write, write_mask)
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\n")
    write_mask(tmp_path / "masks" / "5.png", MASK * 0 + 9)
    data = opsin.data.open(tmp_path)
    for split in data.splits.values():
        assert all(split[i][1].eq(9).sum() == 0 for i in range(len(split)))
    assert [(Path(name).name, "the number 9" in reason) for name, reason in data.skipped] == [("5.png", True)]


def test_mask_errors(tmp_path, write, write_mask):
    write_mask(tmp_path / "a" / "masks" / "1.png", MASK)
    with pytest.raises(BadInput, match=r"holds masks .*but no images"):
        opsin.data.open(tmp_path / "a")
    masked_set(tmp_path / "b" / "images", tmp_path / "b" / "x", write, write_mask)
    masked_set(tmp_path / "b" / "y", tmp_path / "b" / "masks", write, write_mask)
    for file in (tmp_path / "b" / "masks").iterdir():
        file.rename(file.with_name(f"m{file.name}"))
    with pytest.raises(BadInput, match=r"no mask in .* has the name of an image"):
        opsin.data.open(tmp_path / "b", kind="masks")
    masked_set(tmp_path / "c" / "images", tmp_path / "c" / "masks", write, write_mask, mask=MASK * 0)
    with pytest.raises(BadInput, match="one class only"):
        opsin.data.open(tmp_path / "c")


def test_face_masks_are_no_segmentation(tmp_path, write):
    """Class folders that happen to bear the layout's words stay classes."""
    for name in ("mask", "no_mask"):
        for i in range(4):
            write(tmp_path / name / f"{i}.png")
    assert opsin.data.open(tmp_path).task == "classify"
    for name in ("low", "medium", "high"):
        for i in range(4):
            write(tmp_path / "quality" / name / f"{i}.png")
    assert opsin.data.open(tmp_path / "quality").classes == ("high", "low", "medium")


# -- pairs


def paired_set(degraded: Path, clean: Path, write, count: int = 10, scale: int = 1, suffix: str = "") -> None:
    for i in range(count):
        write(clean / f"{i}.png", seed=i, size=(12, 16))
        write(degraded / f"{i}{suffix}.png", seed=100 + i, size=(12 // scale, 16 // scale))


@pytest.mark.parametrize("names", [("degraded", "clean"), ("input", "target"), ("LR", "HR"), ("hazy", "gt")])
@pytest.mark.parametrize("order", ["alone", "above", "below"])
def test_pair_layouts(names, order, tmp_path, write):
    for split, count in (("train", 10), ("test", 2)):
        places = [
            {"alone": tmp_path / n, "above": tmp_path / split / n, "below": tmp_path / n / split}[order] for n in names
        ]
        paired_set(*places, write, count)
    data = opsin.data.open(tmp_path)
    assert (data.task, data.scale, data.size) == ("restore", 1, (12, 16))
    lengths = {name: len(split) for name, split in data.splits.items()}
    assert lengths == ({"train": 7, "val": 1, "test": 2} if order == "alone" else {"train": 9, "val": 1, "test": 2})
    item = data.train.items[0]
    assert Path(item.image).name == Path(item.target).name and Path(item.image) != Path(item.target)
    assert names[0] in Path(item.image).parts and names[1] in Path(item.target).parts


def test_pairs_of_another_scale(tmp_path, write):
    paired_set(tmp_path / "lr", tmp_path / "hr", write, scale=4, suffix="x4")
    write(tmp_path / "lr" / "odd.png", size=(5, 5))
    write(tmp_path / "hr" / "odd.png", size=(12, 16))
    write(tmp_path / "lr" / "alone.png")
    data = opsin.data.open(tmp_path)
    low, clean = data.train[0]
    assert (data.scale, low.shape, clean.shape) == (4, (3, 3, 4), (3, 12, 16))
    assert {Path(name).name for name, _ in data.skipped} == {"odd.png", "alone.png"}


def test_pair_errors(tmp_path, write):
    paired_set(tmp_path / "lr", tmp_path / "hr", write, suffix="_small")
    with pytest.raises(BadInput, match=r"no image in .* has the name"):
        opsin.data.open(tmp_path)
    paired_set(tmp_path / "x" / "lr", tmp_path / "x" / "hr", write)
    with pytest.raises(BadInput, match="degrade= does not apply"):
        opsin.data.open(tmp_path / "x", degrade="noise")


# -- clean folder + degradation, and crops


def test_clean_folder_with_a_degradation(tmp_path, write):
    for i in range(20):
        write(tmp_path / f"{i:02}.png", seed=i, size=(13, 17))
    data = opsin.data.open(tmp_path, degrade="bicubic:2")
    low, clean = data.train[3]
    assert (data.task, data.scale, data.size, data.classes) == ("restore", 2, (6, 8), ())
    assert low.shape == (3, 6, 8) and clean.shape == (3, 12, 16)
    assert torch.equal(clean, opsin.data.open(tmp_path).train[3][0][:, :12, :16])
    assert len(data.train) == 18 and len(data.mean) == 3
    with pytest.raises(BadInput, match="too small"):
        opsin.data.open(tmp_path, degrade="bicubic:20")


def test_crops_of_pairs_stay_aligned(tmp_path, write):
    for i in range(10):
        write(tmp_path / f"{i}.png", seed=i, size=(40, 50))
    data, whole = (opsin.data.open(tmp_path, degrade="bicubic:2", **o) for o in ({"crop": 12}, {}))
    low, clean = data.train[0]
    assert data.size == (6, 6) and low.shape == (3, 6, 6) and clean.shape == (3, 12, 12)
    full_low, full_clean = whole.train[0]
    places = [
        (y, x) for y in range(15) for x in range(20) if torch.equal(full_low[:, y : y + 6, x : x + 6], low)
    ]  # fmt: skip
    assert len(places) == 1
    y, x = (2 * p for p in places[0])
    assert torch.equal(full_clean[:, y : y + 12, x : x + 12], clean)
    assert data.val[0][1].shape == (3, 40, 50)
    assert torch.equal(data.train[0][0], low)
    data.train.set_epoch(1)
    assert not torch.equal(data.train[0][0], low)
    with pytest.raises(BadInput, match="multiple of the scale"):
        opsin.data.open(tmp_path, degrade="bicubic:3", crop=16)


def test_an_epoch_reaches_the_noise_below_the_crop(tmp_path, write):
    for i in range(4):
        write(tmp_path / f"{i}.png", seed=i, size=(8, 8))
    split = opsin.data.open(tmp_path, degrade="noise:25", crop=8).train
    before = split[0][0]
    split.set_epoch(3)
    assert torch.equal(split[0][1], split[0][1]) and not torch.equal(split[0][0], before)


def test_crops_larger_than_the_image():
    class One:
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return torch.arange(12.0).reshape(1, 3, 4) / 12, torch.ones(3, 4).long()

    image, mask = Crops(One(), 6)[0]
    assert image.shape == (1, 6, 6) and mask.shape == (6, 6)
    assert torch.equal(image[0, :3, 4:], image[0, :3, [3, 2]]) and torch.equal(image[0, 3:], image[0, [2, 1, 0]])
    assert mask[:3, :4].eq(1).all() and mask.sum() == 12 + 24 * IGNORE
    with pytest.raises(IndexError):
        Crops(One(), 6)[1]


def test_subset_keeps_the_order(tmp_path, write):
    for i in range(10):
        write(tmp_path / f"{i}.png", seed=i)
    split = opsin.data.open(tmp_path).train
    subset = Subset(split, [4, 1])
    assert len(subset) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(subset, (split[4], split[1]), strict=True))


def test_real_scenes(opsin_data):
    data = opsin.data.open(opsin_data / "camvid", ignore=11)
    assert data.task == "segment" and len(data.classes) == 11
    raw = np.array(Image.open(data.test.items[0].target))
    expected = torch.from_numpy(np.where(raw == 11, IGNORE, raw).astype(np.int64))
    assert torch.equal(data.test[0][1], expected)
