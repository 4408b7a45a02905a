"""Export: a model to one file that runs without Opsin, checked against PyTorch before it gets its name.

ONNX goes through `torch.onnx` (the exporter built on `torch.export`) and is checked with onnxruntime; `.pt2` is the
exported program itself. The batch stays free unless told otherwise, and the check uses another batch size than the
export did, so that a batch frozen into the graph is found here and not in production.
"""

import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin._verbs import make_callable
from opsin.deploy.facts import KEY, Facts
from opsin.errors import BadInput, MissingExtra, OpsinError
from opsin.tasks.outputs import TensorOutput, output_name

Format = Literal["onnx", "torch"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch"}
PROTOBUF_LIMIT = 2**31 - 2**24  # bytes that one ONNX file can hold, less room for the graph
TOLERANCE = 1e-3  # largest difference from PyTorch, relative to the largest output (at least 1)


class ExportFailed(OpsinError):
    """The model cannot be written in this format, or the file does not compute what the model computes."""


class Exported(NamedTuple):
    """difference: the largest absolute one between the file's outputs and PyTorch's; None where it was not checked."""

    path: Path
    format: Format
    difference: float | None
    bytes: int
    seconds: float


def export(model: Any, path: str | Path, **options: Any) -> Path:
    """Writes a model to a file; see `write` for the options."""
    return write(model, path, **options).path


def write(
    model: nn.Module | str | Path | Any,
    path: str | Path,
    *,
    example: Float[Tensor, "n c h w"] | None = None,
    input_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    format: Format | None = None,
    dynamic_batch: bool = True,
    check: bool = True,
    tolerance: float = TOLERANCE,
    facts: Facts | None = None,
    force: bool = False,
) -> Exported:
    """Writes a model to `path` and compares the file with PyTorch.

    model: a module, a run (or its folder), or a name of the catalogue.
    example: an input of the shape to export; otherwise `input_size` (height and width) and `channels` make one.
    format: "onnx" or "torch"; by default what the suffix says (.onnx, .pt2).
    dynamic_batch: leave the batch size free.
    tolerance: of the check, relative to the largest output where that exceeds 1.
    facts: what the file says about itself; known for a run.
    Raises BadInput (file exists, no size known), ExportFailed (does not export, or differs), MissingExtra (onnx).
    """
    started = time.perf_counter()
    path, chosen = _target(Path(path), format, force)
    from opsin.deploy.source import open_model

    model, known = open_model(model)
    facts = facts or known
    example = _example(example, input_size, channels, facts)
    if chosen == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    network = TensorOutput(copy.deepcopy(model)).cpu().eval().requires_grad_(False)
    facts = _complete(facts, network.model, example)
    partial = path.with_name(f".{path.name}.partial")
    try:
        WRITERS[chosen](network, example, partial, facts, dynamic_batch)
        difference = _difference(network, partial, chosen, example, dynamic_batch) if check else None
        if difference is not None and not difference[0] <= tolerance * max(1.0, difference[1]):
            raise ExportFailed(
                f"the exported '{path.name}' differs from PyTorch by {difference[0]:.2g}, more than {tolerance:g}; "
                "nothing was written (a higher tolerance accepts it)"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(
        path, chosen, difference and difference[0], path.stat().st_size, round(time.perf_counter() - started, 2)
    )


def _target(path: Path, format: Format | None, force: bool) -> tuple[Path, Format]:
    if path.is_dir():
        raise BadInput(f"'{path}' is a folder; name the file to write, for example {path / 'model.onnx'}")
    chosen = format or SUFFIXES.get(path.suffix.lower())
    if chosen is None or chosen not in WRITERS:
        raise BadInput(f"'{path.name}' does not say the format; end it in .onnx or .pt2, or pass format='onnx'")
    if path.exists() and not force:
        raise BadInput(f"'{path}' exists already; use --force to replace it, or another name")
    if not path.parent.is_dir():
        raise BadInput(f"there is no folder '{path.parent}' to write '{path.name}' in; make it first")
    return path, chosen


def _example(
    example: Tensor | None, input_size: int | tuple[int, int] | None, channels: int | None, facts: Facts | None
) -> Tensor:
    if example is not None:
        return example.detach().cpu()
    size = input_size if input_size is not None else facts.size if facts else (0, 0)
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise BadInput("the size of the input is not known; say --input, for example --input 224")
    shape = (2, channels or (facts.channels if facts else 3), height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _complete(facts: Facts | None, model: nn.Module, example: Tensor) -> Facts:
    """The description, with shape and output taken from what is really exported."""
    with torch.no_grad():
        output = output_name(model(example))
    base = facts or Facts(name=type(model).__name__, task="classify" if output == "logits" else "")
    channels, height, width = example.shape[1:]
    return Facts(base.name, base.task, base.classes, channels, (height, width), output)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that Opsin does not use."""
    log = logging.getLogger("torch.onnx._internal.exporter")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _program(network: nn.Module, example: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    example = example if len(example) > 1 or not dynamic_batch else example.repeat(2, 1, 1, 1)  # 1 would specialise
    shapes = {"image": {0: torch.export.Dim("batch")}} if dynamic_batch else None
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=shapes)
    except Exception as error:
        hint = "; try dynamic_batch=False (--fixed-batch)" if dynamic_batch else ""
        raise ExportFailed(f"torch.export cannot take this model: {_reason(error)}{hint}") from error


def _reason(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip().rstrip(".")


def _write_onnx(network: nn.Module, example: Tensor, path: Path, facts: Facts, dynamic_batch: bool) -> None:
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    if weights > PROTOBUF_LIMIT:
        raise ExportFailed(f"{weights / 2**30:.1f} GB of weights do not fit into one ONNX file; export to .pt2 instead")
    with _quiet():
        program = _program(network, example, dynamic_batch)
        try:
            onnx = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=["image"], output_names=[facts.output]
            )
        except Exception as error:
            raise ExportFailed(f"ONNX cannot express this model: {_reason(error)}; export to .pt2 instead") from error
        assert onnx is not None
        if dynamic_batch:
            shape = onnx.model.graph.inputs[0].shape
            assert shape is not None and not isinstance(shape[0], int)
            onnx.rename_axes({shape[0]: "batch"})
        onnx.model.metadata_props[KEY] = facts.to_text()
        onnx.model.producer_name = "opsin"
        onnx.save(str(path), external_data=False)


def _write_torch(network: nn.Module, example: Tensor, path: Path, facts: Facts, dynamic_batch: bool) -> None:
    with _quiet(), path.open("wb") as file:
        torch.export.save(_program(network, example, dynamic_batch), file, extra_files={f"{KEY}.json": facts.to_text()})


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path, Facts, bool], None]] = {
    "onnx": _write_onnx, "torch": _write_torch,
}  # fmt: skip


@torch.no_grad()
def _difference(
    network: nn.Module, path: Path, format: Format, example: Tensor, dynamic_batch: bool
) -> tuple[float, float]:
    """The largest absolute difference over two batch sizes, and the largest absolute output."""
    from opsin.deploy.runner import OnnxRunner, ProgramRunner

    runner = (OnnxRunner if format == "onnx" else ProgramRunner)(path)
    differences, largest = [], 0.0
    for images in (example, torch.cat([example.flip(-1), example])[: len(example) + 1]):
        if dynamic_batch or len(images) == len(example):
            expected = network(images)
            differences.append((runner(images) - expected).abs().max().item())
            largest = max(largest, expected.abs().max().item())
    return max(differences), largest


def _need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(package, "export")


make_callable(__name__)
