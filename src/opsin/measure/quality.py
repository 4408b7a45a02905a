"""Quality metrics whose conventions matter: mean IoU with ignored pixels, and mean average precision (COCO and VOC).

All are `torchmetrics.Metric`s, so they add up over batches and over the processes of a distributed run. Everything that
torchmetrics already has with the usual convention (accuracy, F1, ...) is taken from there.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from opsin.measure.image_quality import PsnrY, SsimY, psnr_y, rgb_to_ycbcr, ssim_y, ycbcr_to_rgb

COLUMNS = 7  # image, class, score (or 1 where difficult), x0, y0, x1, y1


class MeanIoU(Metric):
    """Mean over classes of intersection over union, over all pixels of the data set together.

    ignore: this label's pixels do not count, whatever was predicted there. Classes that occur neither in prediction nor
    in truth are left out of the mean.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    confusion: Tensor

    def __init__(self, num_classes: int, ignore: int = 255, **options: Any):
        super().__init__(**options)
        self.num_classes, self.ignore = num_classes, ignore
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Float[Tensor, "n k h w"] | Int[Tensor, "n h w"], truth: Int[Tensor, "n h w"]) -> None:
        """predicted: logits, or the class of each pixel."""
        classes = predicted.argmax(1) if predicted.ndim == truth.ndim + 1 else predicted
        self.confusion += multiclass_confusion_matrix(classes, truth, self.num_classes, ignore_index=self.ignore)

    def per_class(self) -> Float[Tensor, " k"]:
        """IoU of each class; NaN for a class that never occurs."""
        hits = self.confusion.diag().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - hits
        return (hits / union).float()

    def compute(self) -> Tensor:
        return self.per_class().nanmean()


class _Detections(Metric):
    """Keeps all detections and all true boxes, each a row of seven numbers."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    found: list[Tensor]
    true: list[Tensor]
    images: Tensor

    def __init__(self, classes: int, **options: Any):
        super().__init__(**options)
        self.classes = classes
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")
        self.add_state("images", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[dict[str, Tensor]], targets: Sequence[dict[str, Tensor]]) -> None:
        """One dict per image: predictions with boxes (n, 4: x0 y0 x1 y1 in pixels), labels, scores; targets with boxes,
        labels and optionally difficult (bool: neither demanded nor punished)."""
        for predicted, target in zip(predictions, targets, strict=True):
            difficult = target.get("difficult", torch.zeros(len(target["labels"])))
            image = self._next_image()
            self.found.append(self._rows(image, predicted["labels"], predicted["scores"], predicted["boxes"]))
            self.true.append(self._rows(image, target["labels"], difficult, target["boxes"]))

    def _next_image(self) -> int:
        """A number that no other image has, in no other process either."""
        processes = torch.distributed.is_available() and torch.distributed.is_initialized()
        size, rank = (torch.distributed.get_world_size(), torch.distributed.get_rank()) if processes else (1, 0)
        self.images += 1
        return (int(self.images) - 1) * size + rank

    def _rows(self, image: int, labels: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
        head = torch.stack([torch.full((len(labels),), float(image)), labels.cpu(), scores.cpu()], 1)
        return torch.cat([head, boxes.detach().reshape(-1, 4).cpu()], 1).double().to(self.device)

    def _all(self) -> tuple[np.ndarray, np.ndarray]:
        """All rows of (found, true)."""
        empty = torch.zeros(0, COLUMNS, dtype=torch.float64)
        rows = [dim_zero_cat(state).cpu() if len(state) else empty for state in (self.found, self.true)]
        return rows[0].reshape(-1, COLUMNS).numpy(), rows[1].reshape(-1, COLUMNS).numpy()


class CocoMAP(_Detections):
    """COCO's mean average precision, computed by pycocotools: `map` (mean over IoU 0.50 to 0.95), `map_50`, `map_75`,
    by size `map_small`, `map_medium`, `map_large`, and recall `mar_100`; -1 where there is nothing to measure on."""

    NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")

    def compute(self) -> dict[str, Tensor]:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        found, true = self._all()
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "info": {}, "images": [{"id": int(i)} for i in sorted({*found[:, 0], *true[:, 0]})],
                "categories": [{"id": c} for c in range(self.classes)],
                "annotations": [_annotation(i, row) for i, row in enumerate(true, 1)],
            }  # fmt: skip
            truth.createIndex()
            results = [_annotation(i, row) | {"score": float(row[2])} for i, row in enumerate(found, 1)]
            if not results or not len(true):
                return {name: torch.tensor(0.0 if len(true) else -1.0) for name in self.NAMES}
            evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: torch.tensor(float(x)) for name, x in zip(self.NAMES, evaluation.stats, strict=False)}


def _annotation(number: int, row: np.ndarray) -> dict[str, Any]:
    """A row as COCO writes it: corner, width, height. A difficult box is COCO's crowd: it absorbs and is not missed."""
    image, label, difficult, x0, y0, x1, y1 = (float(v) for v in row)
    width, height = x1 - x0, y1 - y0
    return {
        "id": number, "image_id": int(image), "category_id": int(label), "bbox": [x0, y0, width, height],
        "area": width * height, "iscrowd": int(difficult == 1.0),
    }  # fmt: skip


class VocAP(_Detections):
    """Pascal VOC's average precision (2010 on): the area under the precision-recall curve made monotone, at one IoU.

    A detection is right if the true box that it overlaps most reaches `iou` and has not been found by a surer one.
    """

    def __init__(self, classes: int, iou: float = 0.5, **options: Any):
        super().__init__(classes, **options)
        self.iou = iou

    def compute(self) -> Tensor:
        """The mean over classes that have a true box."""
        return self.per_class().nanmean()

    def per_class(self) -> Float[Tensor, " k"]:
        """Average precision of each class; NaN where no true box has it."""
        found, true = self._all()
        return torch.tensor(
            [_voc_ap(found[found[:, 1] == c], true[true[:, 1] == c], self.iou) for c in range(self.classes)]
        )


def _voc_ap(found: np.ndarray, true: np.ndarray, threshold: float) -> float:
    """Area under the monotone precision-recall curve of one class."""
    wanted = int((true[:, 2] == 0).sum())
    if not wanted:
        return float("nan")
    of_image = {image: np.flatnonzero(true[:, 0] == image) for image in np.unique(true[:, 0])}
    taken = np.zeros(len(true), dtype=bool)
    right: list[bool] = []
    for row in found[np.argsort(-found[:, 2], kind="stable")]:
        rows = of_image.get(row[0], np.zeros(0, dtype=int))
        overlaps = _iou(row[3:], true[rows, 3:])
        best = rows[overlaps.argmax()] if len(rows) and overlaps.max() >= threshold else None
        if best is not None and true[best, 2] == 1:
            continue
        right.append(best is not None and not taken[best])
        if best is not None:
            taken[best] = True
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * np.diff(hits / wanted, prepend=0.0)).sum())


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of one box with many."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    inside = np.prod(np.clip(high - low, 0, None), 1)
    areas = np.prod(boxes[:, 2:] - boxes[:, :2], 1) + np.prod(box[2:] - box[:2])
    return inside / np.maximum(areas - inside, 1e-12)


__all__ = [
    "CocoMAP", "MeanIoU", "PsnrY", "SsimY", "VocAP", "psnr_y", "rgb_to_ycbcr", "ssim_y", "ycbcr_to_rgb",
]  # fmt: skip
