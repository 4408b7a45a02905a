"""What a backbone is for: model + loss + metric.

A task model's `forward(images, targets)` returns losses by name; `forward(images)` returns typed predictions.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

from opsin.data import Boxes, Data

Losses = dict[str, Tensor]


@dataclass
class Classes:
    """Predictions of a classifier."""

    logits: Float[Tensor, "n k"]

    @property
    def labels(self) -> Int[Tensor, " n"]:
        return self.logits.argmax(1)


@dataclass
class Masks:
    """Predictions of a segmenter, at the resolution of the input."""

    logits: Float[Tensor, "n k h w"]

    @property
    def labels(self) -> Int[Tensor, "n h w"]:
        return self.logits.argmax(1)


@dataclass
class Detections:
    """Predictions of a detector: per image its boxes (x0, y0, x1, y1), classes and scores, best first."""

    boxes: list[Boxes]
    scores: list[Float[Tensor, " n"]]

    @property
    def table(self) -> Float[Tensor, "b n 6"]:
        """All of it in one tensor: corners, score, class. For detectors that give each image as many boxes."""
        rows = [
            torch.cat((boxes.boxes, scores[:, None], boxes.labels[:, None].to(scores.dtype)), 1)
            for boxes, scores in zip(self.boxes, self.scores, strict=True)
        ]
        return torch.stack(rows)


@dataclass
class Dense:
    """Predictions of one number or vector per pixel (depth, flow, anomaly), in the task's unit."""

    values: Float[Tensor, "n c h w"]


@dataclass
class Embeddings:
    """Predictions of an embedder: vectors of length 1."""

    vectors: Float[Tensor, "n d"]


@dataclass
class Images:
    """Predictions of a restorer, values in [0, 1]."""

    images: Float[Tensor, "n c h w"]


class TaskModel(nn.Module):
    """A network that knows its loss: what `fit` trains."""

    def forward(self, images: Float[Tensor, "n c h w"], targets: Any = None) -> Any:
        """Losses when given targets, typed predictions otherwise."""
        raise TypeError(f"{type(self).__name__} does not implement forward()")


class Task(Protocol):
    """Turns any fitting model into a task model, and says how it is scored."""

    name: str
    score: str  # the name of the number that ranks models; higher is better

    def wrap(self, model: nn.Module, data: Data) -> TaskModel:
        """Puts the task's head and loss on a model. Raises BadInput where the two do not fit."""
        ...

    def metric(self, data: Data) -> Metric:
        """A fresh metric; `update_metric` feeds it."""
        ...

    def update_metric(self, metric: Metric, predictions: Any, targets: Any) -> None: ...
