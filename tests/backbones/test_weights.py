"""Weights from files: what fits loads, and what does not is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import opsin
from opsin.errors import BadInput

TINY = dict(depths=(1, 1), dims=(4, 8), num_classes=3)


@pytest.fixture
def model():
    return opsin.create("convnext", **TINY)


def test_safetensors_and_pth_load(model, tmp_path: Path):
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}}, tmp_path / "b.pth")
    x = torch.randn(1, 3, 32, 32)
    for name in ("a.safetensors", "b.pth"):
        again = opsin.create("convnext", weights=str(tmp_path / name), **TINY)
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("nowhere.safetensors", "no weights file"),
        ("shipped", "come with the package"),
        ("hub", "no hub repository"),
    ],
)
def test_missing_weights_are_named(weights, says):
    with pytest.raises(BadInput, match=says):
        opsin.create("convnext_iso_small", weights=weights, **TINY)


def test_broken_file_is_named(tmp_path: Path):
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(BadInput, match=r"broken\.safetensors.*cannot be read"):
        opsin.create("convnext", weights=str(tmp_path / "broken.safetensors"), **TINY)


def test_pickled_code_is_not_run(tmp_path: Path):
    class Trap:
        def __reduce__(self):
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(BadInput, match="cannot be read"):
        opsin.create("convnext", weights=str(tmp_path / "trap.pth"), **TINY)
    assert not (tmp_path / "sprung").exists()


def test_weights_of_another_size_are_named(model, tmp_path: Path):
    save_file(model.state_dict(), tmp_path / "small.safetensors")
    with pytest.raises(BadInput, match="do not fit"):
        opsin.create("convnext", weights=str(tmp_path / "small.safetensors"), **TINY | dict(num_classes=4))
