"""Exported files compute what the model computes, say what they are, and replace nothing unasked."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import opsin
import opsin.deploy.export as export_module
from opsin.cli import run as opsin_command
from opsin.deploy import export
from opsin.deploy.export import ExportFailed, write
from opsin.deploy.runner import open_runner
from opsin.errors import BadInput, MissingExtra


class FrozenBatch(nn.Module):
    """Computes something else for every batch size but the one it was exported with."""

    def forward(self, image):
        return image.mean((1, 2, 3))[:, None] * (3 if image.shape[0] == 2 else 1)


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_a_file_reproduces_the_model_for_any_batch(tmp_path, model, suffix, facts):
    exported = write(model, tmp_path / f"m.{suffix}", facts=facts)
    runner = open_runner(exported.path)
    assert exported.difference is not None and exported.difference < 1e-5
    assert runner.facts == facts
    for batch in (1, 2, 7):
        images = torch.rand(batch, 3, 16, 16)
        torch.testing.assert_close(runner(images), model(images).logits, atol=1e-5, rtol=0)


def test_onnx_file_stands_alone(tmp_path, model, facts):
    path = export(model, tmp_path / "m.onnx", facts=facts)
    onnx.checker.check_model(str(path))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # weights inside, nothing left behind
    session = onnxruntime.InferenceSession(path)
    assert session.get_inputs()[0].shape == ["batch", 3, 16, 16]
    images = np.random.default_rng(0).random((4, 3, 16, 16), dtype=np.float32)
    (logits,) = session.run(["logits"], {"image": images})
    np.testing.assert_allclose(logits, model(torch.from_numpy(images)).logits.detach(), atol=1e-5)


def test_training_mode_is_left_alone_and_not_exported(tmp_path, model, facts):
    model.norm.running_mean.fill_(0.3)
    model.train()
    exported = write(model, tmp_path / "m.onnx", facts=facts)
    images = torch.rand(2, 3, 16, 16)
    assert model.training and all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(open_runner(exported.path)(images), model.eval()(images).logits, atol=1e-5, rtol=0)


def test_a_difference_above_the_tolerance_writes_nothing(tmp_path, model, monkeypatch, facts):
    def writes_other_weights(network, *rest):
        original(network, *rest)
        nn.init.normal_(network.model.head.weight)

    original = export_module.WRITERS["onnx"]
    monkeypatch.setitem(export_module.WRITERS, "onnx", writes_other_weights)
    with pytest.raises(ExportFailed, match="differs from PyTorch"):
        export(model, tmp_path / "m.onnx", facts=facts)
    assert not list(tmp_path.iterdir())


def test_a_batch_size_frozen_into_the_graph_is_refused(tmp_path):
    with pytest.raises(ExportFailed):
        export(FrozenBatch(), tmp_path / "m.onnx", input_size=8)
    assert write(FrozenBatch(), tmp_path / "m.onnx", input_size=8, dynamic_batch=False).difference < 1e-5


class Inverts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.eye(3) * 2)

    def forward(self, image):
        return torch.einsum("ij,njhw->nihw", torch.linalg.inv(self.matrix), image)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    with pytest.raises(ExportFailed, match=r"linalg_inv_ex.*export to \.pt2 instead"):
        export(Inverts(), tmp_path / "m.onnx", input_size=8)
    assert export(Inverts(), tmp_path / "m.pt2", input_size=8).is_file()


def test_nothing_is_replaced_without_force(tmp_path, model, facts):
    path = tmp_path / "m.onnx"
    path.write_text("mine")
    with pytest.raises(BadInput, match="exists already"):
        export(model, path, facts=facts)
    assert path.read_text() == "mine"
    assert export(model, path, facts=facts, force=True).stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("m.tflite", {"input_size": 8}, "does not say the format"),
        ("m.onnx", {}, "--input"),
        ("no/m.onnx", {"input_size": 8}, "there is no folder"),
        (".", {"input_size": 8}, "is a folder"),
    ],
)
def test_bad_requests_are_one_sentence(tmp_path, model, name, options, sentence, facts):
    with pytest.raises(BadInput, match=sentence):
        export(model, tmp_path / name, **options)


def test_onnx_missing_names_the_extra(tmp_path, model, monkeypatch, facts):
    monkeypatch.setattr(export_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"opsin\[export\]"):
        export(model, tmp_path / "m.onnx", facts=facts)


def test_files_that_are_not_models_are_named(tmp_path):
    for name in ("x.onnx", "x.pt2"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(BadInput, match=name):
            open_runner(tmp_path / name)
    with pytest.raises(BadInput, match="does not exist"):
        open_runner(tmp_path / "absent")


def test_the_verb_stays_callable_whoever_imported_its_file():
    assert callable(opsin.export) and callable(opsin.deploy.export) and opsin.export is export_module.export


def test_command_exports_a_name_of_the_catalogue(tmp_path, capsys):
    target = str(tmp_path / "r.pt2")
    assert opsin_command(["export", "resnet20_cifar(num_classes=3)", "--input", "32", "-o", target]) == 0
    assert "torch, " in capsys.readouterr().out
    assert open_runner(target)(torch.rand(5, 3, 32, 32)).shape == (5, 3)
    assert opsin_command(["export", "resnet20_cifar", "--input", "32", "-o", target]) == 2
    assert "--force" in capsys.readouterr().err
    assert opsin_command(["export", "resnet21_cifar", "-o", str(tmp_path / "x.onnx")]) == 2
    assert "resnet20_cifar" in capsys.readouterr().err
