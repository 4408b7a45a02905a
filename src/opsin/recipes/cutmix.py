"""CutMix: paste a box of one training image into another, and mix the labels by area.

Yun et al. 2019, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
arXiv:1905.04899. With a mask M that is 0 inside the box (eq. 1-2):

    x = M x_a + (1 - M) x_b,   y = lambda y_a + (1 - lambda) y_b,   lambda ~ Beta(alpha, alpha)
    box centre uniform over the image, box sides sqrt(1 - lambda) of the image's

The box is clipped at the border, so lambda is counted again from the pixels that were really pasted.
"""

from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opsin.backbones import Backbone
from opsin.errors import BadInput
from opsin.recipes import Recipe
from opsin.recipes.mixing import soft

VARIANTS = {
    "cutmix_cifar": dict(prob=0.5),
    "cutmix_imagenet": dict(prob=1.0),
}


class Box(NamedTuple):
    """Rows top..bottom and columns left..right, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def random_box(height: int, width: int, lam: float) -> Box:
    """A box of share 1 - lam of the image, centred anywhere, clipped at the border (eq. 2)."""
    side = (1 - lam) ** 0.5
    h, w = int(height * side), int(width * side)
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    return Box(max(y - h // 2, 0), min(y + h // 2, height), max(x - w // 2, 0), min(x + w // 2, width))


def paste(images: Float[Tensor, "n c h w"], other: Float[Tensor, "n c h w"], box: Box) -> Float[Tensor, "n c h w"]:
    """`images` with the box of `other` in it; neither is changed."""
    mixed = images.clone()
    mixed[..., box.top : box.bottom, box.left : box.right] = other[..., box.top : box.bottom, box.left : box.right]
    return mixed


class CutMix(Recipe):
    """Mixes every training batch with a permutation of itself, one box for the whole batch.

    Args: alpha of Beta(alpha, alpha), 1 in the paper; prob, the share of batches that are mixed (0.5 on CIFAR, 1 on
        ImageNet).
    """

    def __init__(self, alpha: float = 1.0, prob: float = 1.0):
        super().__init__()
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.prob = prob

    def transform(
        self, images: Float[Tensor, "n c h w"], targets: Int[Tensor, " n"] | Float[Tensor, "n k"], num_classes: int
    ) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        if self.prob == 0 or torch.rand(()) >= self.prob:
            return images, targets
        height, width = images.shape[-2:]
        order, box, labels = self.draw(targets, num_classes, height, width)
        return paste(images, images[order], box), labels

    def draw(self, targets: Tensor, num_classes: int, height: int, width: int) -> tuple[Tensor, Box, Tensor]:
        """Who is mixed with whom, where, and the labels that follow from the clipped box."""
        order = torch.randperm(len(targets)).to(targets.device)
        box = random_box(height, width, float(self.beta.sample()))
        lam = 1 - box.area / (height * width)
        labels = soft(targets, num_classes)
        return order, box, lam * labels + (1 - lam) * labels[order]


class FeatureCutMix(CutMix):
    """CutMix on a hidden map (the paper's "Feature CutMix"): the box is pasted after a stage drawn for each batch.

    Works for backbones whose `stages` are the modules behind `feature_info`; raises BadInput for others.
    """

    def __init__(self, alpha: float = 1.0, prob: float = 1.0):
        super().__init__(alpha, prob)
        self.strides: list[int] = []
        self.hooks: list[RemovableHandle] = []
        self.pending: tuple[int, Tensor, Box] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.attach(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.detach()

    def attach(self, model: nn.Module) -> None:
        """Hooks the stages of the backbone inside `model`."""
        backbone = next((m for m in model.modules() if isinstance(m, Backbone)), None)
        stages = list(getattr(backbone, "stages", ()))
        if backbone is None or len(stages) != len(backbone.feature_info):
            raise BadInput("feature CutMix needs a backbone with one module in `stages` per pyramid level")
        self.strides = [info.stride for info in backbone.feature_info]
        self.hooks = [stage.register_forward_hook(partial(self._mix, i)) for i, stage in enumerate(stages)]

    def detach(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.hooks, self.strides = [], []

    def _mix(self, index: int, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        if not module.training or self.pending is None or self.pending[0] != index:
            return output
        _, order, box = self.pending
        return paste(output, output[order], box)

    def transform(self, images: Tensor, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        self.pending = None
        if not self.strides or self.prob == 0 or torch.rand(()) >= self.prob:
            return images, targets
        index = int(torch.randint(len(self.strides), ()))
        height, width = (side // self.strides[index] for side in images.shape[-2:])
        order, box, labels = self.draw(targets, num_classes, height, width)
        self.pending = (index, order, box)
        return images, labels
