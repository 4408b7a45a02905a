"""Without timm, or with a timm that cannot be imported, the wrapper says what to do."""

import importlib.util
import sys

import pytest

import opsin
from opsin.errors import BadInput, MissingExtra


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed here")
def test_missing_timm_is_named():
    with pytest.raises(MissingExtra, match=r"opsin\[peers\]"):
        opsin.create("timm:resnet50")


def fake_timm(folder, monkeypatch, body: str) -> None:
    (folder / "timm.py").write_text(body)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "timm", raising=False)


def test_torchvision_without_its_operators_is_explained(tmp_path, monkeypatch):
    fake_timm(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(BadInput, match="torchvision"):
        opsin.create("timm:resnet50")


def test_other_failures_are_not_hidden(tmp_path, monkeypatch):
    fake_timm(tmp_path, monkeypatch, "raise RuntimeError('something else')")
    with pytest.raises(RuntimeError, match="something else"):
        opsin.create("timm:resnet50")
