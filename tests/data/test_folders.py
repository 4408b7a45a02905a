"""Folders of images: layouts, splits, limits, and files that cannot be read."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import opsin.data
from opsin.data import Data
from opsin.data.splits import Arrays, Samples, complete, divide, first, permutation
from opsin.errors import BadInput, UnknownName


def class_set(root: Path, write, classes=("cat", "dog"), count: int = 10, **options) -> Path:
    for c, name in enumerate(classes):
        for i in range(count):
            write(root / name / f"{i:02}.png", seed=100 * c + i, **options)
    return root


def contents(data: Data, split: str) -> list[tuple[bytes, int]]:
    return [
        (image.numpy().tobytes(), label)
        for image, label in (data.splits[split][i] for i in range(len(data.splits[split])))
    ]


def test_class_folders_without_splits(tmp_path, write):
    data = opsin.data.open(class_set(tmp_path / "pets", write, count=20))
    assert (data.name, data.task, data.classes, data.channels, data.size) == (
        "pets",
        "classify",
        ("cat", "dog"),
        3,
        (12, 16),
    )
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 28, "val": 4, "test": 8}
    everything = [sample for name in data.splits for sample in contents(data, name)]
    assert len(set(everything)) == 40
    for name, split in data.splits.items():
        assert sum(label for _, label in contents(data, name)) == len(split) / 2  # of both classes alike
    again = opsin.data.open(str(tmp_path / "pets"))
    assert all(contents(again, name) == contents(data, name) for name in data.splits)
    assert not data.skipped


def test_image_and_label_belong_together(tmp_path, write):
    data = opsin.data.open(class_set(tmp_path, write))
    files = {}
    for number, name in enumerate(data.classes):
        for file in (tmp_path / name).iterdir():
            pixels = torch.from_numpy(np.array(Image.open(file)).astype(np.float32) / 255).permute(2, 0, 1)
            files[pixels.contiguous().numpy().tobytes()] = number
    for split in data.splits:
        assert all(files[image] == label for image, label in contents(data, split))


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "validation", "testing"), ("train", "valid", "test")]
)
def test_split_folders(tmp_path, write, names):
    for count, name in zip((6, 2, 3), names):
        class_set(tmp_path / name, write, count=count)
    data = opsin.data.open(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 12, "val": 4, "test": 6}


def test_validation_is_carved_out_of_train(tmp_path, write):
    class_set(tmp_path / "train", write, count=20)
    class_set(tmp_path / "test", write, count=3)
    data = opsin.data.open(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 36, "val": 4, "test": 6}
    assert not set(contents(data, "train")) & set(contents(data, "val"))


def test_a_class_missing_from_a_split_keeps_its_number(tmp_path, write):
    class_set(tmp_path / "train", write, ("ant", "bee", "cat"), 3)
    class_set(tmp_path / "test", write, ("cat",), 3)
    data = opsin.data.open(tmp_path)
    assert {label for _, label in contents(data, "test")} == {2}


def test_a_class_may_be_called_train(tmp_path, write):
    data = opsin.data.open(class_set(tmp_path, write, ("bus", "car", "train")))
    assert data.classes == ("bus", "car", "train")


def test_flat_folder_has_no_labels(tmp_path, write):
    for i in range(20):
        write(tmp_path / f"{i}.png", seed=i, size=(10 + i, 16))
    data = opsin.data.open(tmp_path)
    assert (data.task, data.classes, data.size) == ("images", (), None)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 18, "val": 2}
    assert data.test is data.val
    assert data.train[0][1] == 0
    assert len(opsin.data.open(class_set(tmp_path / "x", write), kind="images").train) == 18


def test_large_or_uneven_images_are_read_when_asked_for(tmp_path, write):
    class_set(tmp_path / "uneven", write, ("a1", "b1"), 5)
    write(tmp_path / "uneven" / "a1" / "tall.png", size=(30, 16))
    assert isinstance(opsin.data.open(tmp_path / "uneven").train, Samples)
    assert opsin.data.open(tmp_path / "uneven").size is None
    assert isinstance(opsin.data.open(class_set(tmp_path / "large", write, size=(100, 40), count=5)).train, Samples)
    even = opsin.data.open(tmp_path / "uneven", size=12)
    assert isinstance(even.train, Arrays) and even.size == (12, 12)
    assert {even.train[i][0].shape for i in range(len(even.train))} == {(3, 12, 12)}
    assert opsin.data.open(tmp_path / "uneven", size=(6, 9)).train[0][0].shape == (3, 6, 9)


def test_arrays_give_the_same_as_samples(tmp_path, write, monkeypatch):
    class_set(tmp_path, write)
    fast = opsin.data.open(tmp_path)
    monkeypatch.setattr("opsin.data.sources.ARRAY_SIDE", 0)
    slow = opsin.data.open(tmp_path)
    assert isinstance(fast.train, Arrays) and isinstance(slow.train, Samples)
    assert all(contents(fast, name) == contents(slow, name) for name in fast.splits)
    assert np.allclose(fast.mean, slow.mean) and np.allclose(fast.std, slow.std)
    images, labels = fast.train.batch(torch.tensor([3, 1]))
    assert torch.equal(images, torch.stack([fast.train[3][0], fast.train[1][0]]))
    assert labels.tolist() == [fast.train[3][1], fast.train[1][1]]


def test_deep_images_in_memory_keep_their_depth(tmp_path):
    for name in ("a1", "b1"):
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(np.full((5, 5), 1000 + i, np.uint16)).save(tmp_path / name / f"{i}.png")
    image, _ = opsin.data.open(tmp_path).train[0]
    assert image.shape == (1, 5, 5) and 1000 <= image[0, 0, 0] * 65535 < 1004.1


def test_grey_images_are_one_channel_unless_asked(tmp_path, write):
    class_set(tmp_path, write, channels=1)
    assert opsin.data.open(tmp_path).channels == 1
    assert opsin.data.open(tmp_path, channels=3).train[0][0].shape == (3, 12, 16)
    write(tmp_path / "cat" / "colour.png", seed=7)
    assert opsin.data.open(tmp_path).channels == 3
    assert opsin.data.open(tmp_path, channels=1).train[0][0].shape == (1, 12, 16)


def test_statistics_are_those_of_the_training_split(tmp_path, write):
    for lazily in (False, True):
        root = class_set(tmp_path / str(lazily), write, size=(120, 16) if lazily else (12, 16))
        data = opsin.data.open(root)
        pixels = torch.stack([data.train[i][0] for i in range(len(data.train))]).double()
        assert np.allclose(data.mean, pixels.mean((0, 2, 3)), atol=1e-6)
        assert np.allclose(data.std, pixels.std((0, 2, 3), correction=0), atol=1e-6)


# -- limits and shuffles


def test_limit_is_nested_and_fixed(tmp_path, write):
    root = class_set(tmp_path, write, count=20)
    few, more = opsin.data.open(root, limit=5), opsin.data.open(root, limit=9)
    assert [len(s) for s in few.splits.values()] == [5, 4, 5]
    assert set(contents(few, "train")) < set(contents(more, "train"))
    assert contents(opsin.data.open(root, limit=5), "train") == contents(few, "train")


def test_the_permutation_never_changes():
    assert permutation(8) == [5, 1, 2, 6, 3, 4, 7, 0]
    assert permutation(8, "a") != permutation(8, "b")
    assert first("abcdef", None) == list("abcdef")


def test_shares_of_small_classes():
    labels = [0] * 100 + [1] * 3 + [2] * 2
    parts = divide(labels, {"test": 0.2, "val": 0.1})
    count = {name: [sum(labels[i] == c for i in part) for c in range(3)] for name, part in parts.items()}
    assert count == {"train": [70, 1, 2], "test": [20, 1, 0], "val": [10, 1, 0]}
    assert sorted(i for part in parts.values() for i in part) == list(range(105))
    assert list(complete({"test": [], "train": []}, "images")) == []


# -- what cannot be read


def test_unreadable_files_are_skipped_named_and_counted(tmp_path, write):
    class_set(tmp_path, write)
    bad = {"empty.png": b"", "text.jpg": b"no image", "cut.png": (tmp_path / "cat" / "00.png").read_bytes()[:-200]}
    for name, content in bad.items():
        (tmp_path / "cat" / name).write_bytes(content)
    data = opsin.data.open(tmp_path)
    assert {Path(name).name for name, _ in data.skipped} == set(bad)
    assert all(name in reason for name, reason in data.skipped)
    assert sum(map(len, data.splits.values())) == 20


def test_damage_found_while_training_does_not_stop_it(tmp_path, write):
    root = class_set(tmp_path, write, size=(100, 120), count=6)
    data = opsin.data.open(root)
    for i in range(3):
        file = root / "dog" / f"{i:02}.png"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)
    assert not data.skipped
    for _ in range(2):
        images = [split[i][0] for split in data.splits.values() for i in range(len(split))]
    assert len(images) == 12 and all(torch.isfinite(image).all() for image in images)
    assert sorted(Path(name).name for name, _ in data.skipped) == ["00.png", "01.png", "02.png"]
    read = []
    data.train.read = lambda item, reader=data.train.read: read.append(item) or reader(item)
    assert len([data.train[i] for i in range(len(data.train))]) == len(read)  # nothing broken is tried again


def test_files_that_vanish_while_training(tmp_path, write):
    data = opsin.data.open(class_set(tmp_path / "set", write, size=(100, 120), count=5))
    shutil.rmtree(tmp_path / "set" / "dog")
    assert {data.train[i][1] for i in range(len(data.train))} == {0}
    shutil.rmtree(tmp_path / "set" / "cat")
    with pytest.raises(BadInput, match="none of the"):
        data.test[0]


def test_splits_travel_to_workers_and_end(tmp_path, write):
    data = opsin.data.open(class_set(tmp_path, write, size=(100, 120), count=4))
    copy = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(copy[1][0], data.train[1][0]) and torch.equal(copy[-1][0], copy[len(copy) - 1][0])
    with pytest.raises(IndexError):
        copy[len(copy)]
    loader = torch.utils.data.DataLoader(data.train, batch_size=2, num_workers=1)
    assert sum(len(images) for images, _ in loader) == len(data.train)


def test_many_files_show_a_bar(tmp_path, write, monkeypatch, capsys):
    monkeypatch.setattr("opsin.data.splits.WORTH_A_BAR", 1)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    data = opsin.data.open(class_set(tmp_path, write, count=40))
    assert sum(map(len, data.splits.values())) == 80
    assert "Checking images" in capsys.readouterr().err


# -- errors, one sentence each


def folder_of_text(root: Path, write) -> Path:
    (root / "notes.txt").write_text("hello")
    return root


ERRORS = {
    "missing path": (lambda r, w: r / "gone", {}, "there is no file or folder"),
    "empty folder": (lambda r, w: r, {}, "holds no images"),
    "no images": (folder_of_text, {}, "holds no images"),
    "one class": (lambda r, w: class_set(r, w, ("cat",)), {}, "one class only"),
    "no classes": (lambda r, w: w(r / "a.png").parent, {"kind": "classes"}, "no class folders"),
    "single image": (lambda r, w: w(r / "a.png"), {}, "single image"),
    "odd file": (lambda r, w: folder_of_text(r, w) / "notes.txt", {}, "no data set"),
    "channels": (class_set, {"channels": 2}, "channels=2"),
    "limit": (class_set, {"limit": 0}, "limit=0"),
    "size": (class_set, {"size": -3}, "size=-3"),
    "size of text": (class_set, {"size": "224"}, "size='224'"),
    "crop of classes": (class_set, {"crop": 8}, "crop=8"),
    "masks": (class_set, {"kind": "masks"}, "no image and mask folders"),
    "pairs": (class_set, {"kind": "pairs"}, "no pair of folders"),
    "coco": (class_set, {"kind": "coco"}, "no COCO annotations"),
    "voc": (class_set, {"kind": "voc"}, "no Pascal VOC annotations"),
    "parquet": (class_set, {"kind": "parquet"}, "no .parquet file"),
    "video": (class_set, {"kind": "video"}, "no video file"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(ERRORS))
def test_errors_are_one_sentence(case, tmp_path, write):
    make, options, words = ERRORS[case]
    with pytest.raises(BadInput) as error:
        opsin.data.open(make(tmp_path, write), **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) or options


def test_unknown_names_suggest(tmp_path, write):
    root = class_set(tmp_path, write)
    with pytest.raises(UnknownName, match="did you mean classes"):
        opsin.data.open(root, kind="clases")
    with pytest.raises(UnknownName, match="did you mean limit"):
        opsin.data.open(root, limits=3)
    with pytest.raises(UnknownName, match="did you mean cifar10"):
        opsin.data.open("cifar")


def test_all_images_unreadable(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"no image that can be used; the first: .*is empty"):
        opsin.data.open(tmp_path)


def test_a_missing_split_is_said():
    with pytest.raises(BadInput, match="no split 'train'"):
        Data("x", "images", {"test": Arrays(torch.zeros(1, 3, 2, 2), torch.zeros(1))}).train
