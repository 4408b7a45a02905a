"""Restoration as a task: a degraded image to the clean one.

A restorer that knows its own loss (`loss(image, clean)`: on luminance, at low resolution, ...) is trained with that;
others with the distance of their output from the clean image.
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

DISTANCES = {"l1": F.l1_loss, "mse": F.mse_loss}


class RestorerModel(TaskModel):
    """A restorer that knows its loss: its own, or else "l1" or "mse"."""

    def __init__(self, restorer: Restorer, distance: Literal["l1", "mse"] = "l1"):
        super().__init__()
        self.restorer = restorer
        self.distance = DISTANCES[distance]

    def forward(
        self, images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n c h2 w2"] | None = None
    ) -> Images | Losses:
        if targets is None:
            return Images(self.restorer(images))
        own = getattr(self.restorer, "loss", None)
        return {"loss": own(images, targets) if own else self.distance(self.restorer(images), targets)}


class Restore:
    """The task. Ranks models by PSNR in decibels, over RGB, averaged over images."""

    name = "restore"
    score = "psnr"

    def __init__(self, distance: Literal["l1", "mse"] = "l1"):
        self.distance = distance

    def wrap(self, model: nn.Module, data: Data) -> RestorerModel:
        """A restorer with its loss. Raises BadInput: no pairs of images, no restorer, another scale."""
        if isinstance(model, RestorerModel):
            return model
        if data.task != "restore":
            raise BadInput(
                f"'{data.name}' has no pairs of degraded and clean images (its task is '{data.task}'); open a folder "
                "of pairs, or clean images with degrade="
            )
        if not isinstance(model, Restorer):
            raise BadInput(f"restoration needs a restorer, which {type(model).__name__} is not")
        if model.scale != data.scale:
            raise BadInput(
                f"the restorer enlarges {model.scale} times but the clean images of '{data.name}' are {data.scale} "
                f"times as large as the degraded ones; create it with scale={data.scale}"
            )
        return RestorerModel(model, self.distance)

    def metric(self, data: Data) -> Metric:
        return PeakSignalNoiseRatio(data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))

    def update_metric(self, metric: Metric, predictions: Images, targets: Float[Tensor, "n c h w"]) -> None:
        metric.update(predictions.images.clamp(0, 1), targets)
