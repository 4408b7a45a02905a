"""Restoration as a task: a degraded image to the clean one.

A restorer's loss is the mean absolute error in [0, 1]; a restorer that repairs another space than RGB (one that
super-resolves luma only, say) declares `space(images)`, the map from images into it, and the loss is taken there.
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio

from opsin.data import Data
from opsin.errors import BadInput
from opsin.restore import Restorer
from opsin.tasks import Images, Losses, TaskModel

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


class RestorerModel(TaskModel):
    """A restorer that knows its loss: "l1" or "mse"."""

    def __init__(self, restorer: nn.Module, loss: Literal["l1", "mse"] = "l1"):
        super().__init__()
        self.restorer = restorer
        self.loss = loss

    def losses(self, predictions: Images, targets: Float[Tensor, "n c h w"]) -> Losses:
        """The distance in the restorer's own space."""
        space = getattr(self.restorer, "space", lambda images: images)
        return {"loss": LOSSES[self.loss](space(predictions.images), space(targets))}

    def forward(
        self, images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n c h2 w2"] | None = None
    ) -> Images | Losses:
        predictions = Images(self.restorer(images))
        return predictions if targets is None else self.losses(predictions, targets)


class Restore:
    """The task. Ranks models by PSNR in decibels, averaged over images, in RGB."""

    name = "restore"
    score = "psnr"

    def wrap(self, model: nn.Module, data: Data) -> RestorerModel:
        """A restorer with its loss (`training_loss` of the restorer, else L1). Raises BadInput where scales differ."""
        scale = getattr(model, "scale", data.scale)
        if scale != data.scale:
            raise BadInput(
                f"the restorer enlarges by {scale} but the pairs of '{data.name}' differ by {data.scale}; "
                f"create it with scale={data.scale}, or open the data at scale {scale}"
            )
        if not isinstance(model, Restorer) and not hasattr(model, "forward"):
            raise BadInput("restoration needs a restorer: a module from images to images")
        return RestorerModel(model, getattr(model, "training_loss", "l1"))

    def metric(self, data: Data) -> Metric:
        return PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))

    def update_metric(self, metric: Metric, predictions: Images, targets: Tensor) -> None:
        metric.update(predictions.images.clamp(0, 1), targets)
