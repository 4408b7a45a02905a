"""Patch robustness: what one bad patch, natural or adversarial, does to a classifier at every place of the image.

Gu, Tresp and Qin 2022, "Are Vision Transformers Robust to Patch Perturbations?", arXiv:2111.10659. With M the mask of
one patch of the token grid (section 3):

    natural      x' = x + M (c(x) - x),  c a corruption of the whole image
    adversarial  x' = x (1 - M) + M d,   d <- clip(d + a sign(grad_d CE(f(x'), y))),  y the clean prediction

The patch has no norm bound; a position is done at the first step that changes the label. The fooling rate is the share
of (image, position) pairs whose prediction changes, over the images that are classified correctly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.robust.corruptions import Corrupt
from opsin.tasks.outputs import scores

Corruption = Callable[[Tensor], Tensor]
VARIANTS = {
    "vit_patch_robustness": dict(patch_size=16),
    "vit_patch_robustness_32": dict(patch_size=32),
}


def patch_masks(
    height: int, width: int, patch_size: int, shift: int = 0
) -> tuple[Bool[Tensor, "p 1 h w"], tuple[int, int]]:
    """One mask per position of the grid, row by row, and the grid's size.

    shift: pixels by which the grid is moved down and right, off the tokens; patches that leave the image are dropped.
    """
    rows, columns = (height - shift) // patch_size, (width - shift) // patch_size
    if rows < 1 or columns < 1:
        raise BadInput(f"a patch of {patch_size} pixels does not fit into images of {height} x {width}")
    y, x = (torch.arange(height) - shift) // patch_size, (torch.arange(width) - shift) // patch_size
    cell = torch.where((y[:, None] >= 0) & (x >= 0) & (y[:, None] < rows) & (x < columns), y[:, None] * columns + x, -1)
    return cell == torch.arange(rows * columns)[:, None, None, None], (rows, columns)


@dataclass
class Fooling:
    """What one patch at each position did.

    images: the perturbed inputs. fooled: whether the prediction changed. grid: positions per column and row.
    """

    images: Float[Tensor, "n p c h w"]
    fooled: Bool[Tensor, "n p"]
    grid: tuple[int, int]

    @property
    def rate(self) -> float:
        """Share of (image, position) pairs that changed the prediction."""
        return float(self.fooled.float().mean())

    @property
    def map(self) -> Float[Tensor, "rows columns"]:
        """The rate by position; positions that were not tried are not a number."""
        return self.fooled.float().mean(0).view(self.grid) if self.fooled.shape[1] == self.grid[0] * self.grid[1] else (
            torch.full(self.grid, torch.nan)
        )  # fmt: skip


class PatchPerturbation:
    """Perturbs one patch at every position, or at those that are named. Members say what stands in the patch."""

    def __init__(self, patch_size: int = 16, shift: int = 0, positions: tuple[int, ...] | None = None):
        self.patch_size, self.shift, self.positions = patch_size, shift, positions

    def masks(self, images: Tensor) -> tuple[Bool[Tensor, "p 1 h w"], tuple[int, int]]:
        masks, grid = patch_masks(*images.shape[-2:], self.patch_size, self.shift)
        masks = masks if self.positions is None else masks[list(self.positions)]
        return masks.to(images.device), grid

    def fill(
        self, model: nn.Module, images: Float[Tensor, "m c h w"], masks: Bool[Tensor, "m 1 h w"],
        predicted: Int[Tensor, " m"],
    ) -> Float[Tensor, "m c h w"]:  # fmt: skip
        """The perturbed images, one mask each."""
        raise TypeError(f"{type(self).__name__} does not implement fill()")

    def fooling(self, model: nn.Module, images: Float[Tensor, "n c h w"]) -> Fooling:
        """Every image at every position. The model is used in eval mode; its own clean prediction is what must hold."""
        masks, grid = self.masks(images)
        n, p = len(images), len(masks)
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                predicted = scores(model, images).argmax(1).repeat_interleave(p)
            perturbed = self.fill(model, images.repeat_interleave(p, 0), masks.repeat(n, 1, 1, 1), predicted)
            with torch.no_grad():
                now = torch.cat([scores(model, part).argmax(1) for part in perturbed.split(256)])
        finally:
            model.train(was_training)
        return Fooling(perturbed.view(n, p, *images.shape[1:]), (now != predicted).view(n, p), grid)

    def __call__(
        self, model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, "n c h w"]:
        """Each image with its patch at a position that fools the model, or at the first one where none does."""
        result = self.fooling(model, images)
        return result.images[torch.arange(len(images)), result.fooled.float().argmax(1)]

    def allowed(self, images: Float[Tensor, "n c h w"], attacked: Float[Tensor, "n c h w"]) -> Bool[Tensor, " n"]:
        """Whether only pixels of one patch differ, and all values are in [0, 1]."""
        masks, _ = self.masks(images)
        changed = (images != attacked).any(1)
        inside = (changed[:, None] <= masks[:, 0]).flatten(2).all(2).any(1)
        return inside & (attacked.flatten(1).min(1).values >= 0) & (attacked.flatten(1).max(1).values <= 1)


class PatchCorruption(PatchPerturbation):
    """Natural: the patch of a corrupted copy of the whole image.

    corruption: images in [0, 1] to the same; by default ImageNet-C's Gaussian noise at severity 5.
    """

    def __init__(
        self, corruption: Corruption | None = None, patch_size: int = 16, shift: int = 0,
        positions: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__(patch_size, shift, positions)
        self.corruption = corruption or Corrupt()

    def fill(self, model: nn.Module, images: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
        return torch.where(masks, self.corruption(images).clamp(0, 1), images)


class PatchAttack(PatchPerturbation):
    """Adversarial: signed gradient steps on the patch's content from uniform noise, until the label changes.

    Args: steps at most (10,000 in the paper); step_size in image units (2/255).
    """

    def __init__(
        self, patch_size: int = 16, steps: int = 10_000, step_size: float = 2 / 255, shift: int = 0,
        positions: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__(patch_size, shift, positions)
        self.steps, self.step_size = steps, step_size

    def fill(self, model: nn.Module, images: Tensor, masks: Tensor, predicted: Tensor) -> Tensor:
        filled = torch.where(masks, torch.rand_like(images), images)
        active = torch.arange(len(images), device=images.device)
        for _ in range(self.steps):
            holding = []
            for part in active.split(256):
                gradient, changed = self._gradient(model, filled[part], predicted[part])
                part, gradient = part[~changed], gradient[~changed]
                stepped = (filled[part] + self.step_size * gradient.sign()).clamp(0, 1)
                filled[part] = torch.where(masks[part], stepped, images[part])
                holding.append(part)
            active = torch.cat(holding)
            if len(active) == 0:
                break
        return filled

    def _gradient(self, model: nn.Module, x: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss at x, and which predictions have changed already."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = scores(model, x)
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, predicted, reduction="sum"), x)
        return gradient, logits.argmax(1) != predicted
