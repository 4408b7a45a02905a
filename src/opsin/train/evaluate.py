"""Scoring a trained task model on a split, without a trainer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsin.data import Data
from opsin.errors import BadInput
from opsin.layers.device import device_of
from opsin.tasks import Task, TaskModel
from opsin.train.module import numbers
from opsin.train.sampler import EvalBatches, loader, mix, seed_generators


class Predictions(NamedTuple):
    """What a model says of a split, in the split's order."""

    logits: Tensor
    targets: Tensor


def split_of(data: Data, split: str) -> Any:
    """A split by name. Raises BadInput."""
    if split not in data.splits:
        raise BadInput(f"'{data.name}' has no split '{split}'; it has {', '.join(data.splits)}")
    return data.splits[split]


@torch.inference_mode()
def evaluate(model: TaskModel, task: Task, data: Data, split: str, batch_size: int) -> dict[str, float]:
    """The task's numbers on a split. A model that draws (masks, noise) draws the same each time."""
    samples, device = split_of(data, split), device_of(model)
    metric = task.metric(data).to(device)
    model.eval()
    seed_generators(mix(0, "evaluate"), device)
    for images, targets in loader(samples, data.task, EvalBatches(len(samples), batch_size)):
        targets = targets.to(device) if isinstance(targets, Tensor) else targets
        task.update_metric(metric, model(images.to(device)), targets)
    return numbers(metric.compute(), task.score)


@torch.inference_mode()
def predict(model: TaskModel, data: Data, split: str, batch_size: int) -> Predictions:
    """Logits and targets of a whole split. Raises BadInput where the model does not give logits."""
    samples, device = split_of(data, split), device_of(model)
    model.eval()
    logits, targets = [], []
    for images, truth in loader(samples, data.task, EvalBatches(len(samples), batch_size)):
        predictions = model(images.to(device))
        if not hasattr(predictions, "logits"):
            raise BadInput(f"{type(model).__name__} does not give logits")
        logits.append(predictions.logits.cpu())
        targets.append(truth)
    return Predictions(torch.cat(logits), torch.cat(targets))
