"""Predictions agree with the model, follow its preprocessing, and leave nothing unsaid about files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import opsin
from opsin.cli import run as opsin_command
from opsin.data.images import read_image
from opsin.deploy import export, predict
from opsin.deploy.facts import Facts
from opsin.errors import BadInput


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five images of several sizes and modes in two folders, a truncated one, and a text file."""
    root = tmp_path_factory.mktemp("images")
    (root / "more").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "a.png")
    Image.fromarray(noise[:16, :16]).save(root / "b.png")
    Image.fromarray(noise).convert("L").save(root / "more" / "c.jpg")
    Image.fromarray(noise).convert("RGBA").save(root / "more" / "d.png")
    Image.fromarray(noise[::-1]).save(root / "more" / "e.webp")
    (root / "broken.jpg").write_bytes((root / "more" / "c.jpg").read_bytes()[:300])
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory, trained, facts):
    root = tmp_path_factory.mktemp("models")
    return {suffix: export(trained, root / f"m.{suffix}", facts=facts) for suffix in ("onnx", "pt2")}


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_labels_are_those_of_the_model(folder, exported, trained, facts, suffix):
    found = predict(folder, exported[suffix], batch_size=2)
    assert [Path(row.file).name for row in found] == ["a.png", "b.png", "c.jpg", "d.png", "e.webp"]
    for row in found:
        image = read_image(row.file, 3, size=(16, 16))[None]
        expected = trained(image).logits.softmax(-1)[0]
        assert row.label == facts.classes[int(expected.argmax())]
        assert [p for _, p in row.top] == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)


def test_unreadable_files_are_named_and_counted(folder, exported):
    found = predict([folder / "a.png", folder / "broken.jpg"], exported["onnx"])
    assert len(found) == 1
    assert [name for name, _ in found.skipped] == [str(folder / "broken.jpg")]
    assert "broken.jpg" in found.skipped[0][1]


def test_tables(folder, exported, tmp_path):
    found = opsin.predict(folder, exported["onnx"], top=2)
    with found.save(tmp_path / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "label", "probability", "label_2", "probability_2"]
    assert [r["label"] for r in rows] == [p.label for p in found]
    read = json.loads(found.save(tmp_path / "p.json").read_text())
    assert read["images"][0]["top"] == dict(found.rows[0].top) and len(read["skipped"]) == 1
    with pytest.raises(BadInput, match="exists already"):
        found.save(tmp_path / "p.csv")


def test_command(folder, exported, facts, tmp_path, capsys):
    model = str(exported["onnx"])
    assert opsin_command(["predict", str(folder), "--model", model, "-o", str(tmp_path / "out.csv")]) == 0
    shown = capsys.readouterr()
    assert "5 images labelled" in shown.out and "broken.jpg" in shown.err and "1 of 6 files" in shown.err
    assert opsin_command(["predict", str(folder), "--model", model, "-o", str(tmp_path / "out.csv")]) == 2
    assert opsin_command(["predict", str(folder / "a.png"), "--model", model, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["images"][0]["label"] in facts.classes


@pytest.mark.parametrize(
    ("source", "sentence"),
    [("absent", "there is no image or folder"), ("empty", "holds no images"), ("broken.jpg", "none of the 1 images")],
)
def test_bad_sources_are_one_sentence(folder, exported, source, sentence, tmp_path):
    (tmp_path / "empty").mkdir()
    where = tmp_path if source == "empty" else folder
    with pytest.raises(BadInput, match=sentence):
        predict(where / source, exported["onnx"])


def test_only_classifiers_label(folder, trained, tmp_path):
    path = export(trained, tmp_path / "m.pt2", facts=Facts("masks", "segment", (), 3, (16, 16)))
    with pytest.raises(BadInput, match="'segment'"):
        predict(folder, path)
