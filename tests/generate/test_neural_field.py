"""Neural fields: images and signals as networks of coordinates."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.errors import BadInput, TrainingFailed
from opsin.generate.neural_field import (
    FourierFeatures,
    ImageField,
    Octaves,
    SignalField,
    fit_field,
    fit_image,
    fit_signal,
    load_field,
    parameter_groups,
    save_field,
)  # fmt: skip
from opsin.ops.normact.cam_neural_field import pixel_centres

SMALL = dict(frequencies=16, width=16, depth=2, grid_size=4)


def picture(height: int = 12, width: int = 16) -> Tensor:
    rows, columns = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    return torch.stack((rows, columns, (4 * rows).sin().abs()))


def test_the_published_size():
    field = opsin.create("cam_image")
    assert sum(p.numel() for p in field.parameters()) == 512 * 256 + 2 * 256 * 256 + 3 * 256 + 256 * 3 + 3 + 3 * 2048
    assert field.encoding.proj.shape == (2, 256) and field.encoding.proj.std() == pytest.approx(20 * torch.pi, rel=0.15)


def test_encodings():
    x = torch.rand(5, 2)
    encoding = FourierFeatures(2, 3, 1.0)
    angle = x @ encoding.proj
    assert torch.allclose(encoding(x), torch.cat((angle.sin(), angle.cos()), 1))
    y = Octaves(2, 3)(x)
    assert (
        y.shape == (5, 14)
        and torch.allclose(y[:, 6:8], (4 * x).sin())
        and torch.allclose(y[:, 8:10], x.cos(), atol=1e-6)
    )
    assert torch.equal(Octaves(2, 0)(x), x)


@torch.no_grad()
def test_layers_are_linear_norm_modulation_relu():
    field, places = ImageField(**SMALL), torch.rand(7, 2)
    for layer in field.layers:
        layer.modulation.grid.add_(torch.randn_like(layer.modulation.grid))
    h = field.encoding(places)
    for layer in field.layers:
        scale, shift = layer.modulation(places)
        h = F.relu(F.layer_norm(layer.linear(h), (16,)) * scale + shift)
    assert torch.allclose(field(places), field.last(h).sigmoid(), atol=1e-6)


@torch.no_grad()
def test_fresh_grids_change_nothing_and_coordinates_do_not_see_each_other():
    field, plain = ImageField(**SMALL), ImageField(**SMALL | dict(grid_size=None))
    plain.load_state_dict({k: v for k, v in field.state_dict().items() if "modulation" not in k})
    places = torch.rand(9, 2)
    assert torch.allclose(field(places), plain(places), atol=1e-6)
    assert torch.allclose(field(places)[:2], field(places[:2]), atol=1e-6)


def test_grids_learn_ten_times_as_fast():
    field = ImageField(**SMALL)
    weights, grids = parameter_groups(field, 1e-3)
    assert grids["lr"] == pytest.approx(1e-2) and [p.shape for p in grids["params"]] == [(2, 4, 4)] * 2
    assert len(weights["params"]) + 2 == len(list(field.parameters()))


def test_a_file_becomes_a_field_and_a_picture_of_any_size(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray((255 * picture()).byte().permute(1, 2, 0).numpy()).save(path)
    field = fit_image(path, steps=300, lr=1e-2, sigma=0.5, **SMALL)
    image = field.image()
    assert image.shape == (3, 12, 16) and (image - picture()).square().mean() < 2e-3
    assert field.image(24, 32).shape == (3, 24, 32)
    wide = F.avg_pool2d(field.image(36, 48), 3)
    assert (wide - image).abs().mean() < 0.02, "the same picture at another resolution"
    saved = save_field(field, tmp_path / "a.safetensors")
    again = load_field(saved)
    assert again.size == (12, 16) and (again.image() - image).abs().max() < 0.005
    assert saved.stat().st_size < 2 * sum(t.numel() for t in field.state_dict().values()) + 3000


def test_saving_keeps_the_picture_at_the_default_frequencies(tmp_path):
    field = fit_image(picture(), steps=100, lr=1e-2, **SMALL)
    assert field.settings["sigma"] == 10
    path = save_field(field, tmp_path / "a.safetensors")
    again = load_field(path)
    assert torch.equal(again.encoding.proj, field.encoding.proj)
    assert (again.image() - field.image()).abs().max() < 0.005
    weights = field.state_dict()
    assert path.stat().st_size < 2 * sum(t.numel() for t in weights.values()) + 2 * field.encoding.proj.numel() + 2000


def test_every_second_pixel_and_some_points():
    seen: list[int] = []

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3))

        def forward(self, places: Tensor) -> Tensor:
            seen.append(len(places))
            return self.w.expand(len(places), 3)

    fit_field(Counts(), torch.rand(50, 2), torch.rand(50, 3), steps=2, points=8)
    assert seen == [8, 8]
    losses: list[float] = []
    fit_image(picture(), every=2, steps=3, on_step=lambda step, loss: losses.append(loss), **SMALL)
    assert len(losses) == 3
    places = pixel_centres(12, 16).view(12, 16, 2)[::2, ::2]
    assert places.shape == (6, 8, 2) and places[1, 0, 0] == pytest.approx(2.5 / 12)


def test_a_signal_without_norm_and_activation():
    time = torch.linspace(0, 1, 80)[:, None]
    signal = (20 * time).sin() * time
    field = fit_signal(signal, steps=300, lr=3e-3, octaves=6, width=16, depth=2)
    assert (field.signal(80) - signal).square().mean() < 0.02 and field.signal(7).shape == (7, 1)
    assert isinstance(field.layers[0].norm, nn.Identity) and isinstance(field.layers[0].act, nn.Identity)
    flat = SignalField(octaves=0, width=4, depth=1)
    x = torch.tensor([[0.0], [0.4], [0.8]])
    y = flat(x)
    assert torch.allclose(y[2] - y[1], y[1] - y[0], atol=1e-6), "with fresh grids nothing bends"


@pytest.fixture
def unread(monkeypatch):
    """Tensors of the meta device, which stands for any but the CPU here, have no values to be read."""
    monkeypatch.setattr(Tensor, "isfinite", lambda self: True)
    monkeypatch.setattr(Tensor, "item", lambda self: 1.0)


def test_fields_are_fitted_and_rendered_on_another_device(unread):
    field = fit_image(picture().to("meta"), steps=2, points=20, **SMALL)
    assert field.encoding.proj.is_meta and field.image().is_meta
    assert fit_image(picture(), steps=2, device="meta", **SMALL).image(5, 6).shape == (3, 5, 6)
    signal = fit_signal(torch.rand(20, 1, device="meta"), steps=2, octaves=3, width=4, depth=1)
    assert signal.last.weight.is_meta and signal.signal(7).is_meta


def test_targets_go_to_the_field(unread):
    field = ImageField(**SMALL).to("meta")
    assert fit_field(field, torch.rand(20, 2), torch.rand(20, 3), steps=2, points=8) is field


def test_complaints_are_sentences(tmp_path):
    with pytest.raises(BadInput, match="cannot be built"):
        fit_image(picture(), widht=4)
    with pytest.raises(BadInput, match="there is no field"):
        load_field(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(BadInput, match="not a field"):
        load_field(tmp_path / "bad")
    with pytest.raises(TrainingFailed, match="smaller lr"):
        fit_field(ImageField(**SMALL), torch.rand(4, 2), torch.full((4, 3), float("nan")), steps=1)
    np.testing.assert_raises(BadInput, fit_image, tmp_path / "missing.png")
