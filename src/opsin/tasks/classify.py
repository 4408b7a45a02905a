"""Classification: one label per image.

The loss is cross-entropy with label smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7); targets are classes
or, after recipes such as CutMix, probabilities.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from opsin.backbones import Backbone
from opsin.data import Data
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize
from opsin.tasks import Classes, Losses, TaskModel


class Classifier(TaskModel):
    """A network giving logits, behind the normalisation of its images.

    Args:
        network: a Backbone or any module (n, c, h, w) -> (n, k).
        mean, std: of the images, per channel.
        label_smoothing: the share of probability spread over all classes.
    """

    def __init__(
        self, network: nn.Module, mean: tuple[float, ...] = (), std: tuple[float, ...] = (), label_smoothing: float = 0
    ):
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.network = network
        self.label_smoothing = label_smoothing

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        """The logits of images in [0, 1]."""
        return self.network(self.normalize(images))

    def losses(self, predictions: Classes, targets: Tensor) -> Losses:
        """Cross-entropy with classes (n,) or probabilities (n, k)."""
        return {"loss": F.cross_entropy(predictions.logits.float(), targets, label_smoothing=self.label_smoothing)}

    def forward(self, images: Float[Tensor, "n c h w"], targets: Tensor | None = None) -> Classes | Losses:
        predictions = Classes(self.logits(images))
        return predictions if targets is None else self.losses(predictions, targets)


class Classify:
    """The task. Ranks models by top-1 accuracy."""

    name = "classify"
    score = "accuracy"

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def wrap(self, model: nn.Module, data: Data) -> Classifier:
        """A classifier for the data; a classifier stays as it is.

        Raises BadInput: one class, wrong channels or classes, images too small, a model of another task.
        """
        if len(data.classes) < 2:
            raise BadInput(f"'{data.name}' has {len(data.classes)} class; classification needs at least two")
        check_channels(model, data)
        classes = getattr(model, "num_classes", len(data.classes))
        if classes != len(data.classes):
            raise BadInput(
                f"the network gives {classes} classes but '{data.name}' has {len(data.classes)}; "
                f"create it with num_classes={len(data.classes)}"
            )
        check_size(model, data)
        if isinstance(model, TaskModel) and not isinstance(model, Classifier):
            raise BadInput(f"{type(model).__name__} is not a classifier")
        given = isinstance(model, Classifier)
        classifier = model if given else Classifier(model, data.mean, data.std, self.label_smoothing)
        check_output(classifier, data)
        return classifier

    def metric(self, data: Data) -> Metric:
        return MulticlassAccuracy(num_classes=len(data.classes), average="micro")

    def update_metric(self, metric: Metric, predictions: Classes, targets: Tensor) -> None:
        metric.update(predictions.logits, targets)


def check_channels(model: nn.Module, data: Data) -> None:
    """Raises BadInput where the first convolution takes another number of channels than the images have."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    takes = getattr(model, "in_chans", first.in_channels if first else data.channels)
    if takes != data.channels:
        raise BadInput(
            f"the network takes images of {takes} channels but those of '{data.name}' have {data.channels}; "
            f"create it with in_chans={data.channels}"
        )


def check_size(model: nn.Module, data: Data) -> None:
    """Raises BadInput where the images are smaller than the coarsest stride of a backbone."""
    stride = model.feature_info[-1].stride if isinstance(model, Backbone) else 1
    if data.size and min(data.size) < stride:
        height, width = data.size
        raise BadInput(
            f"the images of '{data.name}' are {height}x{width} pixels, smaller than the network's stride of {stride}; "
            "use larger images or a network for small ones such as metanet_n"
        )


def check_output(classifier: Classifier, data: Data) -> None:
    """Runs one blank image through the classifier. Raises BadInput where it fails or the logits have a wrong shape."""
    if data.size is None:
        return
    height, width = data.size
    parameter = next(classifier.parameters(), torch.empty(0))
    blank = torch.zeros(1, data.channels, height, width, device=parameter.device, dtype=parameter.dtype)
    training = [module for module in classifier.modules() if module.training]
    try:
        with torch.no_grad():
            shape = tuple(classifier.eval().logits(blank).shape)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"the network cannot take the images of '{data.name}' ({data.channels}x{height}x{width}): {reason}"
        ) from error
    finally:
        for module in training:
            module.training = True
    if shape != (1, len(data.classes)):
        raise BadInput(
            f"the network turns one image of '{data.name}' into an output of shape {shape}, not (1, "
            f"{len(data.classes)}): one logit per class"
        )
