"""The data sets by name."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import opsin.data
from opsin.data import IGNORE
from opsin.data.named import NAMED
from opsin.errors import BadInput, MissingData


def test_digits():
    data = opsin.data.open("digits")
    assert (data.task, data.channels, data.size) == ("classify", 1, (8, 8))
    assert data.classes == tuple("0123456789")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 1259, "val": 179, "test": 359}
    raw = load_digits()
    seen = {image.tobytes(): label for image, label in zip(raw.images.astype("float32") / 16, raw.target)}
    for split in data.splits.values():
        assert all(seen[image[0].numpy().tobytes()] == label for image, label in (split[i] for i in range(len(split))))
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert share.sub(0.1).abs().max() < 0.015
    assert data.mean[0] == pytest.approx(float(data.train.images.float().mean()) / 16)


def test_digits_options():
    assert len(opsin.data.open("digits", limit=50).train) == 50
    large = opsin.data.open("digits", channels=3, size=32, limit=20)
    assert large.train[0][0].shape == (3, 32, 32) and large.size == (32, 32) and large.train[0][0].max() <= 1
    assert opsin.data.open("digits", degrade="bicubic:2", limit=9).train[0][0].shape == (1, 4, 4)
    with pytest.raises(BadInput, match="does not apply"):
        opsin.data.open("digits", kind="classes")
    with pytest.raises(BadInput, match="channels=2"):
        opsin.data.open("digits", channels=2)


@pytest.mark.parametrize("name", list(NAMED))
def test_what_is_not_here_says_where_to_get_it(name, monkeypatch, tmp_path):
    for value in ("", str(tmp_path)):
        monkeypatch.setenv("OPSIN_DATA", value)
        with pytest.raises(MissingData) as error:
            opsin.data.open(name)
        sentence = str(error.value)
        assert name in sentence and "OPSIN_DATA" in sentence and NAMED[name].origin in sentence and "\n" not in sentence


SIZES = {  # task, train / val / test, classes, channels, size
    "orl": ("classify", (280, 40, 80), 40, 1, (112, 92)),
    "camvid": ("segment", (367, 101, 233), 11, 3, (360, 480)),
    "bccd": ("detect", (205, 87, 72), 3, 3, (480, 640)),
    "bsds500": ("images", (200, 100, 200), 0, 3, None),
    "set5": ("images", (0, 0, 5), 0, 3, None),
    "set14": ("images", (0, 0, 14), 0, 3, None),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_named_sets(name, opsin_data):
    data = opsin.data.open(name)
    lengths = tuple(len(data.splits.get(split, ())) for split in ("train", "val", "test"))
    assert (data.task, lengths, len(data.classes), data.channels, data.size) == SIZES[name]
    assert data.name == name and not data.skipped
    assert len(data.mean) == len(data.std) == data.channels and all(0 < v < 1 for v in (*data.mean, *data.std))
    image, target = data.test[0]
    assert image.shape[0] == data.channels and image.min() >= 0 and image.max() <= 1
    if name == "camvid":
        assert data.classes[0] == "sky" and set(target.unique().tolist()) <= {*range(11), IGNORE}
    if name == "bccd":
        assert data.classes == ("Platelets", "RBC", "WBC") and target.boxes.max() <= 640 and len(target.labels) > 0


def test_camvid_void_is_ignored_without_a_word_in_classes_txt(tmp_path, monkeypatch, write, write_mask):
    for i in range(4):
        write(tmp_path / "camvid" / "train" / f"{i}.png", seed=i)
        write_mask(tmp_path / "camvid" / "train_labels" / f"{i}.png", np.tile([[3, 11]], (12, 8)))
    (tmp_path / "camvid" / "classes.txt").write_text("\n".join(f"class{i}" for i in range(11)))
    monkeypatch.setenv("OPSIN_DATA", str(tmp_path))
    data = opsin.data.open("camvid")
    assert len(data.classes) == 11 and set(data.train[0][1].unique().tolist()) == {3, IGNORE}


def test_cifar10(opsin_data):
    data = opsin.data.open("cifar10", limit=300)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 300, "val": 300, "test": 300}
    assert data.classes[3] == "cat" and data.size == (32, 32)
    assert data.train.images.dtype == torch.uint8
    kept = {data.train.images[i].numpy().tobytes() for i in range(300)}
    assert not kept & {data.val.images[i].numpy().tobytes() for i in range(300)}
    again = opsin.data.open("cifar10", limit=300)
    assert torch.equal(again.train.images, data.train.images) and torch.equal(again.train.labels, data.train.labels)


@pytest.mark.slow
def test_all_of_cifar10(opsin_data):
    data = opsin.data.open("cifar10")
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 45000, "val": 5000, "test": 10000}
    for split in data.splits.values():
        assert torch.bincount(split.labels).eq(len(split) // 10).all()


def test_berkeley_photos_for_restoration(opsin_data):
    data = opsin.data.open("bsds500", degrade="bicubic:3", limit=4)
    low, clean = data.train[0]
    assert (data.task, data.scale) == ("restore", 3)
    assert clean.shape[-2] == 3 * low.shape[-2] and clean.shape[-1] == 3 * low.shape[-1]
