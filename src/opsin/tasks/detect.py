"""Detection: boxes with a class and a score.

Models are ranked by Pascal VOC's average precision at an overlap of a half (2010 on). On a backbone `Detect` puts the
plainest centre heads that reach the finest level of its pyramid, so that what is compared is the backbone.
"""

from torch import Tensor, nn
from torchmetrics import Metric

from opsin.backbones import Backbone
from opsin.data import Boxes, Data
from opsin.errors import BadInput
from opsin.measure.quality import VocAP
from opsin.tasks import Detections, TaskModel
from opsin.tasks.centernet import PyramidDetector
from opsin.tasks.classify import check_channels

Rows = list[dict[str, Tensor]]


def as_metric_rows(predictions: Detections, targets: list[Boxes]) -> tuple[Rows, Rows]:
    """Predictions and truth as the detection metrics take them."""
    found = [
        {"boxes": boxes.boxes, "labels": boxes.labels, "scores": scores}
        for boxes, scores in zip(predictions.boxes, predictions.scores, strict=True)
    ]
    return found, [{"boxes": target.boxes, "labels": target.labels} for target in targets]


class Detect:
    """The task. Ranks models by AP50, over classes that have a true box."""

    name = "detect"
    score = "ap50"

    def wrap(self, model: nn.Module, data: Data) -> TaskModel:
        """Centre heads on a backbone; a detector stays as it is.

        Raises BadInput: data without boxes, other channels or classes, or a model with no pyramid.
        """
        if data.task != "detect":
            raise BadInput(f"'{data.name}' has no boxes (its task is '{data.task}'); detection needs image + boxes")
        if isinstance(model, TaskModel):
            classes = getattr(model, "num_classes", len(data.classes))
            if classes != len(data.classes):
                raise BadInput(
                    f"the detector finds {classes} classes but '{data.name}' has {len(data.classes)}; "
                    f"create it with num_classes={len(data.classes)}"
                )
            check_channels(model, data)
            return model
        if not isinstance(model, Backbone):
            raise BadInput(f"detection needs a backbone or a detector; {type(model).__name__} is neither")
        check_channels(model, data)
        return PyramidDetector(model, len(data.classes), mean=data.mean, std=data.std)

    def metric(self, data: Data) -> Metric:
        return VocAP(len(data.classes))

    def update_metric(self, metric: Metric, predictions: Detections, targets: list[Boxes]) -> None:
        metric.update(*as_metric_rows(predictions, targets))
