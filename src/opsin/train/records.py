"""The files of a run that hold numbers and pictures."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from opsin.train.checkpoint import write_atomic

CONFIG, RESULT, METRICS = "config.json", "result.json", "metrics.parquet"
WEIGHTS, CURVES, CHECKPOINTS, TENSORBOARD = "weights.safetensors", "curves.png", "checkpoints", "tensorboard"
FILES = (RESULT, CONFIG, METRICS, WEIGHTS, CURVES)


class Row(NamedTuple):
    """One number of a run. epoch: from 0; seconds: of training so far, over all interruptions."""

    step: int
    epoch: int
    split: str
    name: str
    value: float
    seconds: float


def table(rows: Sequence[Row]) -> Any:
    """The rows as a pyarrow table in long form."""
    import pyarrow as pa

    types = (pa.int64(), pa.int64(), pa.string(), pa.string(), pa.float64(), pa.float64())
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(types)
    return pa.table(
        {name: pa.array(column, type=kind) for name, column, kind in zip(Row._fields, columns, types, strict=True)}
    )


def save_rows(folder: Path, rows: Sequence[Row]) -> None:
    """Writes metrics.parquet."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table(rows), buffer)
    write_atomic(folder / METRICS, buffer.getvalue())


def save_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Writes weights.safetensors. Tensors that share memory are written one by one."""
    from safetensors.torch import save

    write_atomic(folder / WEIGHTS, save({name: t.detach().cpu().clone().contiguous() for name, t in state.items()}))


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def save_curves(folder: Path, metrics: Any, score: str) -> None:
    """Draws curves.png from the table of metrics: the losses, and the validation score."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5))
    losses, scores = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.08, right=0.98, bottom=0.16, top=0.96, wspace=0.22)
    for split in ("train", "val"):
        _curve(losses, metrics, split, "loss")
    _curve(scores, metrics, "val", score)
    losses.set(xlabel="step", ylabel="loss")
    scores.set(xlabel="step", ylabel=f"validation {score}")
    losses.legend(frameon=False)
    for axes in (losses, scores):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(folder / CURVES, buffer.getvalue())


def _curve(axes: Any, metrics: Any, split: str, name: str) -> None:
    rows = [r for r in metrics.to_pylist() if r["split"] == split and r["name"] == name]
    marker = "o" if len(rows) < 30 else None
    axes.plot([r["step"] for r in rows], [r["value"] for r in rows], label=split, marker=marker, markersize=3)
