"""What each candidate costs, measured once on this machine, before anything trains.

Building every network with the data's classes, channels and size also finds what cannot work (an option that is wrong,
images smaller than the stride) in seconds instead of after an hour of training.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import nn

from opsin.data import Data
from opsin.errors import BadInput
from opsin.measure.cost import measure
from opsin.measure.memory import peak_memory
from opsin.tasks.outputs import TensorOutput
from opsin.tasks.registry import task_by_name
from opsin.train.build import build_recipes, build_task_model
from opsin.train.table import write_table

REPEATS = 30


def rehearse(models: Iterable[str], recipe: Sequence[str], task: str, data: Data) -> None:
    """Builds the recipes, and every network for the data. Raises BadInput, UnknownName that say which does not fit."""
    build_recipes(recipe)
    for model in models:
        try:
            build_task_model(model, task_by_name(task), data)
        except BadInput as error:
            raise BadInput(str(error) if model in str(error) else f"--models {model}: {error}") from error


def measure_costs(
    folder: Path, models: Iterable[str], task: str, data: Data, began: Callable[[str], None] = lambda model: None
) -> None:
    """Writes the table `costs`, keeping what is there; `began` is told each model that is measured."""
    file = folder / "costs.parquet"
    rows = pq.read_table(file).to_pylist() if file.is_file() else []
    known = {row["model"] for row in rows}
    for model in models:
        if model not in known:
            began(model)
            rows.append({"model": model, **cost_of(build_task_model(model, task_by_name(task), data), data)})
            write_table(folder, "costs", rows)


def cost_of(model: nn.Module, data: Data) -> dict[str, Any]:
    """Parameters, MACs, latency and peak memory of one image of the data's size, normalisation included.

    The training step is of two images: batch norm has no statistics of a single one.
    """
    if data.size is None:
        return {"params": sum(p.numel() for p in model.parameters())}
    network = TensorOutput(model)
    cost = measure(network, data.size, channels=data.channels, modes=("eager",), repeats=REPEATS)
    pair = torch.rand(2, data.channels, *data.size)
    time = cost.latency["eager"]
    return {
        "params": cost.params, "macs": cost.macs, "latency_ms": time.median_ms, "latency_iqr_ms": time.iqr_ms,
        "threads": time.threads, "memory": cost.peak_memory_forward,
        "train_memory": peak_memory(network, (pair,), training=True),
    }  # fmt: skip


def curves(trials: Iterable[tuple[str, int, Path]]) -> Iterator[dict[str, Any]]:
    """The numbers of all runs, for the table `curves`, from (model, seed, folder of the run)."""
    for model, seed, folder in trials:
        if (folder / "metrics.parquet").is_file():
            for row in pq.read_table(folder / "metrics.parquet").to_pylist():
                yield {"model": model, "seed": seed, **row}
