"""Whatever computes predictions, behind one call: an ONNX file, a `.pt2` program, or a run's folder.

A runner has `facts` and maps images (N, C, H, W) in [0, 1] to the model's output tensor.
"""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.deploy.facts import KEY, Facts
from opsin.errors import BadInput, MissingExtra
from opsin.tasks.outputs import TensorOutput


class Runner(Protocol):
    """Images in [0, 1] to the output that `facts` describes."""

    facts: Facts

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Tensor: ...


class OnnxRunner:
    """An ONNX file in onnxruntime, on the CPU."""

    def __init__(self, path: Path):
        if find_spec("onnxruntime") is None:
            raise MissingExtra("onnxruntime", "export")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BadInput(f"'{path}' is not an ONNX file that onnxruntime can run: {_first(error)}") from error
        properties = self.session.get_modelmeta().custom_metadata_map
        if KEY not in properties:
            raise BadInput(f"'{path}' does not say what it predicts; use a file written by `opsin export`")
        self.facts = Facts.from_text(properties[KEY], str(path))
        self.input = self.session.get_inputs()[0].name

    def __call__(self, images: Float[Tensor, "n c h w"]) -> Tensor:
        return torch.from_numpy(self.session.run(None, {self.input: images.numpy()})[0])


class ProgramRunner:
    """A program written by `torch.export`."""

    def __init__(self, path: Path):
        extra: dict[str, Any] = {f"{KEY}.json": ""}
        try:
            with path.open("rb") as file:
                self.module = torch.export.load(file, extra_files=extra).module()
        except Exception as error:
            raise BadInput(f"'{path}' is not a program that torch.export wrote: {_first(error)}") from error
        self.facts = Facts.from_text(extra[f"{KEY}.json"] or "null", str(path))

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n c h w"]) -> Tensor:
        return self.module(images)


class ModuleRunner:
    """A model in PyTorch."""

    def __init__(self, model: torch.nn.Module, facts: Facts):
        self.module, self.facts = TensorOutput(model).eval(), facts

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "n c h w"]) -> Tensor:
        return self.module(images)


def open_runner(source: str | Path | Any) -> Runner:
    """Opens an `.onnx` or `.pt2` file, a run's folder, or a `Run`. Raises BadInput, MissingExtra."""
    from opsin.deploy.source import is_run_folder, open_model

    if not isinstance(source, str | os.PathLike):
        model, facts = open_model(source)
    else:
        path = Path(source)
        if path.is_file() and path.suffix.lower() == ".onnx":
            return OnnxRunner(path)
        if path.is_file() and path.suffix.lower() == ".pt2":
            return ProgramRunner(path)
        if not is_run_folder(path):
            what = "does not exist" if not path.exists() else "is neither an .onnx or .pt2 file nor the folder of a run"
            raise BadInput(f"the model '{path}' {what}; `opsin export` writes such files")
        model, facts = open_model(path)
    if facts is None:
        raise BadInput("a bare model does not say its classes and input size; pass a run or an exported file")
    return ModuleRunner(model, facts)


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def describe(path: str | Path) -> dict[str, Any]:
    """What an exported file says about itself, as plain data."""
    return json.loads(open_runner(path).facts.to_text())
