"""Pre-training as a task of `fit`: images without labels, ranked by the loss that is left."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from opsin.data import Data
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize
from opsin.pretrain import Pretrainer
from opsin.tasks import Losses, TaskModel


@dataclass
class Objective:
    """What a pre-trainer says of a batch without labels: its loss."""

    loss: Tensor


class PretrainModel(TaskModel):
    """A pre-trainer behind the normalisation of its images."""

    def __init__(self, pretrainer: Pretrainer, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.pretrainer = pretrainer

    def forward(self, images: Float[Tensor, "n c h w"], targets: object = None) -> Objective | Losses:
        losses = self.pretrainer(self.normalize(images))
        return Objective(sum(losses.values()).detach()) if targets is None else losses  # type: ignore[union-attr]


class Pretrain:
    """The task. Ranks by the negative loss on held-out images."""

    name = "pretrain"
    score = "negative_loss"

    def wrap(self, model: nn.Module, data: Data) -> PretrainModel:
        """Raises BadInput where the model is no pre-trainer."""
        if not isinstance(model, Pretrainer):
            raise BadInput(f"{type(model).__name__} is no pre-trainer; `opsin list --kind pretrainer` shows them")
        return PretrainModel(model, data.mean, data.std)

    def metric(self, data: Data) -> Metric:
        return MeanMetric()

    def update_metric(self, metric: Metric, predictions: Objective, targets: object) -> None:
        metric.update(-predictions.loss)
