"""Segmentation: a class for each pixel.

The loss is cross-entropy over the pixels that have a class (255 has none). The head that `Segment` puts on a
backbone is linear: one 1x1 convolution on all levels of the pyramid together, so that what is compared is the backbone.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from opsin.backbones import Backbone
from opsin.data import IGNORE, Data
from opsin.errors import BadInput
from opsin.layers.normalize import Normalize
from opsin.measure.quality import MeanIoU
from opsin.tasks import Losses, Masks, TaskModel
from opsin.tasks.classify import check_channels


def resize(maps: Float[Tensor, "n c h w"], size: tuple[int, int] | torch.Size) -> Float[Tensor, "n c h2 w2"]:
    """Bilinear, pixel centres aligned."""
    return maps if tuple(maps.shape[-2:]) == tuple(size) else F.interpolate(maps, size, mode="bilinear")


def pixel_cross_entropy(logits: Float[Tensor, "n k h w"], targets: Int[Tensor, "n h w"]) -> Float[Tensor, ""]:
    """Mean over the pixels that are not 255; zero where there are none."""
    total = F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="sum")
    return total / (targets != IGNORE).sum().clamp(min=1)


class Segmenter(TaskModel):
    """What segmenters share: normalised images in, cross-entropy at full resolution or `Masks` out.

    A member implements `logits(images)` for images in [0, 1] of any size.
    """

    num_classes: int

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        """The logits at the resolution of the images."""
        raise TypeError(f"{type(self).__name__} does not implement logits()")

    def losses(self, predictions: Masks, targets: Int[Tensor, "n h w"]) -> Losses:
        """Cross-entropy at the resolution of the masks."""
        return {"loss": pixel_cross_entropy(predictions.logits, targets)}

    def forward(self, images: Float[Tensor, "n c h w"], targets: Int[Tensor, "n h w"] | None = None) -> Masks | Losses:
        predictions = Masks(self.logits(images))
        return predictions if targets is None else self.losses(predictions, targets)


class LinearSegmenter(Segmenter):
    """A 1x1 convolution on all levels of a backbone's pyramid, each brought to the finest level's size and summed.

    Images are padded with their mean to a multiple of the coarsest stride, so that any size works.
    Args: mean, std of the images, per channel.
    """

    def __init__(self, backbone: Backbone, num_classes: int, mean: tuple[float, ...] = (), std: tuple[float, ...] = ()):
        super().__init__()
        self.num_classes = num_classes
        self.normalize = Normalize(mean, std)
        self.backbone = backbone
        self.heads = nn.ModuleList(
            nn.Conv2d(info.channels, num_classes, 1, bias=i == 0) for i, info in enumerate(backbone.feature_info)
        )
        freeze_unreached(backbone, channels=len(mean) or 3)

    def logits(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k h w"]:
        height, width = images.shape[-2:]
        stride = max(info.stride for info in self.backbone.feature_info)
        padded = F.pad(self.normalize(images), (0, -width % stride, 0, -height % stride))
        scores = [head(level) for head, level in zip(self.heads, self.backbone.features(padded))]
        finest = max((score.shape[-2:] for score in scores), key=lambda size: size[0])
        total = torch.stack([resize(score, finest) for score in scores]).sum(0)
        return resize(total, padded.shape[-2:])[..., :height, :width]


def freeze_unreached(backbone: Backbone, channels: int = 3) -> None:
    """Takes parameters that the pyramid does not depend on (the classifier's) out of training."""
    side = 2 * max(info.stride for info in backbone.feature_info)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    if not parameters:
        return
    training = backbone.training
    image = torch.rand(1, channels, side, side, device=parameters[0].device, dtype=parameters[0].dtype)
    with torch.enable_grad():
        total = torch.stack([level.sum() for level in backbone.eval().features(image)]).sum()
    reached = torch.autograd.grad(total, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, reached):
        parameter.requires_grad_(gradient is not None)
    backbone.train(training)


class Segment:
    """The task. Ranks models by mean intersection over union, over all pixels that have a class."""

    name = "segment"
    score = "miou"

    def wrap(self, model: nn.Module, data: Data) -> TaskModel:
        """A linear segmenter on a backbone; a segmenter stays as it is.

        Raises BadInput: data without masks, one class, other channels or classes, or a model with no pyramid.
        """
        if data.task != "segment":
            raise BadInput(f"'{data.name}' has no masks (its task is '{data.task}'); segmentation needs image + mask")
        if len(data.classes) < 2:
            raise BadInput(f"'{data.name}' has {len(data.classes)} class; segmentation needs at least two")
        if isinstance(model, TaskModel):
            classes = getattr(model, "num_classes", len(data.classes))
            if classes != len(data.classes):
                raise BadInput(
                    f"the segmenter gives {classes} classes but '{data.name}' has {len(data.classes)}; "
                    f"create it with num_classes={len(data.classes)}"
                )
            return model
        if not isinstance(model, Backbone):
            raise BadInput(f"segmentation needs a backbone or a segmenter; {type(model).__name__} is neither")
        check_channels(model, data)
        return LinearSegmenter(model, len(data.classes), data.mean, data.std)

    def metric(self, data: Data) -> Metric:
        return MeanIoU(len(data.classes), ignore=IGNORE)

    def update_metric(self, metric: Metric, predictions: Masks, targets: Int[Tensor, "n h w"]) -> None:
        metric.update(predictions.labels, targets)
