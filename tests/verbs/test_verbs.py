"""Verbs that bring rooms together, on small data, from Python and from the command line."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import opsin
from opsin.cli import run
from opsin.cli.options import parse_options
from opsin.errors import BadInput

VIT = "vit_tiny_patch16_224(image_size=8, patch_size=2, dim=32, depth=2, num_heads=2)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small convolutional run on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    opsin.fit("resnet20_cifar", "digits", epochs=1, out=folder, progress=False, data_options={"limit": 400})
    return folder


@pytest.fixture(scope="module")
def trained_vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "vit"
    opsin.fit(VIT, "digits", epochs=2, out=folder, progress=False, data_options={"limit": 400})
    return folder


@pytest.fixture
def digit(tmp_path) -> Path:
    image, _ = opsin.data.open("digits").test[0]
    path = tmp_path / "digit.png"
    Image.fromarray((image[0] * 255).byte().numpy()).save(path)
    return path


def test_explain(trained, digit, tmp_path, capsys):
    out = tmp_path / "why.png"
    assert run(["explain", str(digit), "--model", str(trained), "-o", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG") and "class" in capsys.readouterr().out
    assert run(["explain", str(digit), "--model", str(trained), "-o", str(out)]) == 2
    assert run(["explain", str(digit), "--model", str(trained), "-o", str(out), "--force", "--method", "lrp"]) == 0
    capsys.readouterr()
    for wrong in (["--method", "zeroq"], ["--target", "10"], ["--target", "-1"]):
        assert run(["explain", str(digit), "--model", str(trained), "-o", str(tmp_path / "x.png"), *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_attack(trained_vit, capsys):
    words = ["attack", str(trained_vit), "digits", "--patch-size", "2", "--steps", "5", "--limit", "3"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "images attacked: 3" in text and len(text.splitlines()) == 8
    assert run([*words, "--temperature", "2"]) == 0
    assert run([*words, "--patch-size", "9"]) == 2
    assert run([*words, "--temperature", "-1"]) == 2


def test_attack_needs_what_it_needs(trained, trained_vit):
    with pytest.raises(BadInput, match="no self-attention"):
        opsin.attack(trained, "digits", patch_size=2, steps=1, limit=2, temperature=2.0)
    with pytest.raises(BadInput, match="not an attack"):
        opsin.attack(trained, "digits", method="cutmix")


def test_compress(trained, tmp_path, capsys):
    out = tmp_path / "small.pt2"
    words = ["compress", str(trained), "digits", "--bits", "4", "--option", "steps=10", "-o", str(out)]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert "accuracy" in text and "bits" in text and out.is_file()
    assert run(words) == 2
    capsys.readouterr()
    for wrong in (["--bits", "1", "--force"], ["--method", "cutmix"], ["--option", "steps"]):
        assert run([*words, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_compressed_file_predicts_like_the_compressed_model(trained, digit, tmp_path):
    out = tmp_path / "small.pt2"
    result = opsin.compress(trained, "digits", budget=opsin.compress.Budget(bits=8), steps=10, output=out)
    assert result.report.after["bits"] <= 8 < result.report.before["bits"]
    image, _ = opsin.data.open("digits").test[0]
    expected = int(result.model.eval()(image[None]).logits.argmax())
    (row,) = opsin.predict(str(digit), out)
    assert row.label == opsin.data.open("digits").classes[expected]
    assert result.save(tmp_path / "plain.pt2").is_file()


def test_pretrain_then_use_the_backbone(tmp_path, capsys):
    out = tmp_path / "simmim"
    words = ["pretrain", "simmim", "digits", "--backbone", VIT, "--option", "mask_patch=4", "--epochs", "1", "-o"]
    assert run([*words, str(out)]) == 0
    weights = out / "backbone.safetensors"
    assert str(weights) in capsys.readouterr().out.replace("\n", "")
    kept = opsin.create(VIT, in_chans=1, num_classes=0, weights=str(weights))
    with_head = opsin.create(VIT, in_chans=1, num_classes=10, weights=str(weights))
    assert torch.equal(kept.blocks[0].attn.qkv.weight, with_head.blocks[0].attn.qkv.weight)
    assert run(["pretrain", "cutmix", "digits", "--backbone", VIT]) == 2


def test_adapt_a_run_to_other_data(trained_vit, tmp_path, capsys):
    out = tmp_path / "adapted"
    words = ["adapt", "bi_adaptformer_h32", str(trained_vit), "digits", "--option", "hidden=8", "--epochs", "1"]
    assert run([*words, "-o", str(out)]) == 0
    size = (out / "adapter.bin").stat().st_size
    assert f"{size:,} bytes" in capsys.readouterr().out.replace("\n", "")
    assert size == 2 * 2 * (8 * 32 // 8 + 8) + 4 * (32 * 10 + 10)
    assert json.loads((out / "result.json").read_text())["status"] == "finished"
    assert run(["adapt", "zeroq", str(trained_vit), "digits", "-o", str(tmp_path / "b")]) == 2


def test_options_read_as_python_values():
    assert parse_options(["a=1", "b=(2, 3)", "c=word", "d='x=y'"]) == {"a": 1, "b": (2, 3), "c": "word", "d": "x=y"}
    for wrong in ("a", "1=2", "a b=3"):
        with pytest.raises(BadInput):
            parse_options([wrong])
