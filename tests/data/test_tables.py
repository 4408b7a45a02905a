"""Parquet in Hugging Face's layout."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import opsin.data
from opsin.data.splits import Arrays
from opsin.errors import BadInput


def png(number: int, size=(6, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((*size, 3), number, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def table(count: int, start: int = 0, struct: bool = True, size=(6, 8)) -> pa.Table:
    """Row i holds an image of the grey level start + i, and the label i % 3."""
    encoded = [png(start + i, size) for i in range(count)]
    images = pa.array([{"bytes": b, "path": None} for b in encoded]) if struct else pa.array(encoded, pa.binary())
    return pa.table({"image": images, "label": pa.array([i % 3 for i in range(count)], pa.int64())})


def named(content: pa.Table) -> pa.Table:
    info = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}}}}
    return content.replace_schema_metadata({"huggingface": json.dumps(info)})


@pytest.mark.parametrize("struct", [True, False])
def test_one_file(tmp_path, struct):
    pq.write_table(table(60, struct=struct), tmp_path / "set.parquet")
    data = opsin.data.open(tmp_path / "set.parquet")
    assert (data.task, data.classes, data.size) == ("classify", ("0", "1", "2"), (6, 8))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 42, "val": 6, "test": 12}
    for split in data.splits.values():
        for i in range(len(split)):
            image, label = split[i]
            assert round(float(image[0, 0, 0]) * 255) % 3 == label


def test_a_folder_of_shards(tmp_path):
    (tmp_path / "data").mkdir()
    for shard, start in (("train-00000-of-00002", 0), ("train-00001-of-00002", 30), ("test-00000-of-00001", 60)):
        pq.write_table(named(table(30, start)), tmp_path / "data" / f"{shard}.parquet")
    pq.write_table(named(table(9, 90)), tmp_path / "data" / "validation-00000-of-00001.parquet")
    data = opsin.data.open(tmp_path)
    assert data.classes == ("ant", "bee", "cow")
    levels = {n: {round(float(s[i][0][0, 0, 0]) * 255) for i in range(len(s))} for n, s in data.splits.items()}
    assert levels == {"train": set(range(60)), "test": set(range(60, 90)), "val": set(range(90, 99))}


def test_large_tables_are_read_by_row_group(tmp_path, monkeypatch):
    monkeypatch.setattr("opsin.data.parquet.IN_MEMORY", 0)
    monkeypatch.setattr("opsin.data.survey.CHECKED_OF_LARGE", 4)
    monkeypatch.setattr("opsin.data.sources.ARRAY_SIDE", 0)
    pq.write_table(table(90), tmp_path / "train.parquet", row_group_size=7)
    pq.write_table(table(90), tmp_path / "test.parquet", row_group_size=7)
    split = opsin.data.open(tmp_path).test
    assert split.items[0].image.shard.rows is None
    order = [88, 0, 7, 6, 89, 41, 13, 14, 0]
    assert [round(float(split[i][0][0, 0, 0]) * 255) for i in order] == order
    assert len(split.items[0].image.shard.groups) <= 4
    assert torch.equal(pickle.loads(pickle.dumps(split))[5][0], split[5][0])


def test_labels_of_text_and_no_labels(tmp_path):
    words = table(30).set_column(1, "label", pa.array([["cow", "ant", "bee"][i % 3] for i in range(30)]))
    pq.write_table(words, tmp_path / "words.parquet")
    assert opsin.data.open(tmp_path / "words.parquet").classes == ("ant", "bee", "cow")
    pq.write_table(table(30).drop(["label"]), tmp_path / "plain.parquet")
    data = opsin.data.open(tmp_path / "plain.parquet")
    assert (data.task, data.classes) == ("images", ())


def test_rows_that_cannot_be_read_are_named(tmp_path):
    images = [{"bytes": png(i), "path": None} for i in range(30)]
    images[4], images[9], images[12] = {"bytes": None, "path": "x"}, {"bytes": b"junk", "path": None}, None
    content = pa.table({"image": pa.array(images), "label": [i % 3 for i in range(30)]})
    pq.write_table(content, tmp_path / "holes.parquet")
    data = opsin.data.open(tmp_path / "holes.parquet")
    assert sorted(name.partition(", row ")[2] for name, _ in data.skipped) == ["12", "4", "9"]
    assert isinstance(data.train, Arrays) and sum(map(len, data.splits.values())) == 27


BAD = {
    "no image": (pa.table({"label": [0, 1]}), "no column of image bytes"),
    "image of numbers": (pa.table({"image": [1, 2], "label": [0, 1]}), "no column of image bytes"),
    "one class": (table(1).take([0, 0]), "one class only"),
    "missing label": (table(2).set_column(1, "label", pa.array([0, None], pa.int64())), "without a label"),
    "label beyond the names": (named(table(2).set_column(1, "label", pa.array([0, 3]))), "labels 0 to 3 for 3 classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", list(BAD))
def test_errors_are_one_sentence(case, tmp_path):
    content, words = BAD[case]
    pq.write_table(content, tmp_path / "bad.parquet")
    with pytest.raises(BadInput) as error:
        opsin.data.open(tmp_path / "bad.parquet")
    assert words in str(error.value) and "bad.parquet" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadInput, match="no readable Parquet table"):
        opsin.data.open(tmp_path / "x.parquet")
