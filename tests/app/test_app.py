"""The page's actions; and, where gradio is there, the page itself."""

from importlib.util import find_spec

import pytest
import torch
from PIL import Image
from torch import nn

import opsin.app.page as page_module
from opsin.app import actions
from opsin.catalog import all_cards
from opsin.deploy import export
from opsin.deploy.facts import Facts
from opsin.errors import BadInput, MissingExtra
from opsin.tasks import Classes


class Brightness(nn.Module):
    """Tells dark images from bright ones."""

    def forward(self, image):
        mean = image.mean((1, 2, 3))
        return Classes(torch.stack([0.5 - mean, mean - 0.5], 1) * 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("app")
    export(Brightness(), root / "m.pt2", facts=Facts("brightness", "classify", ("dark", "bright"), 3, (8, 8)))
    Image.new("RGB", (20, 30), (240, 240, 240)).save(root / "bright.png")
    Image.new("RGB", (20, 30), (10, 10, 10)).save(root / "dark.png")
    return root


def test_catalogue():
    rows = actions.catalogue()
    assert [row[0] for row in rows] == list(all_cards())
    assert all(len(row) == len(actions.HEADINGS) for row in rows)
    backbones = actions.catalogue("backbone", "workbench")
    assert [row[:2] for row in backbones] == [["metanet", "backbone"]]
    assert actions.kinds()[0] == "all" and "backbone" in actions.kinds()


@pytest.mark.parametrize("name", ["metanet", "inceptionnext"])
def test_descriptions(name):
    text = actions.describe(name)
    assert text.startswith(f"### {name}") and "```python" in text and all_cards()[name].summary in text


def test_models_are_found(folder, tmp_path):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "weights.safetensors").touch()
    (tmp_path / "run").mkdir()
    for name in ("weights.safetensors", "result.json"):
        (tmp_path / "run" / name).touch()
    assert set(actions.find_models([folder, tmp_path])) == {str(folder / "m.pt2"), str(tmp_path / "run")}
    assert actions.find_models([folder / "m.pt2"]) == [str(folder / "m.pt2")]
    with pytest.raises(BadInput, match="absent"):
        actions.find_models([tmp_path / "absent"])


def test_labels(folder):
    model = str(folder / "m.pt2")
    for name in ("bright", "dark"):
        found = actions.classify(str(folder / f"{name}.png"), model)
        assert max(found, key=found.get) == name and sum(found.values()) == pytest.approx(1)
    with pytest.raises(BadInput, match="no image yet"):
        actions.classify(None, model)
    with pytest.raises(BadInput, match="no model yet"):
        actions.classify(str(folder / "dark.png"), None)


def test_photos_grow(folder):
    assert Image.open(actions.restore_photo(str(folder / "dark.png"), 2)).size == (40, 60)
    with pytest.raises(BadInput, match="no photo yet"):
        actions.restore_photo(None)


def test_gradio_missing_names_the_extra(monkeypatch):
    monkeypatch.setattr(page_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"opsin\[app\]"):
        page_module.launch()


@pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'opsin[app]'")
def test_the_page_serves_its_actions(folder):
    from gradio_client import Client, handle_file

    page = page_module.build([folder])
    _, address, _ = page.launch(prevent_thread_lock=True, quiet=True, inbrowser=False)
    try:
        client = Client(address, verbose=False)
        found = client.predict(handle_file(folder / "dark.png"), str(folder / "m.pt2"), api_name="/classify")
        assert found["label"] == "dark"
    finally:
        page.close()
