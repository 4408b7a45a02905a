"""Augmentation of batches, through kornia: `(images, targets) -> (images, targets)`.

All randomness is torch's global generator (kornia's too; tests/data/test_transforms.py checks it), which the trainer
seeds before every step; there is no other state. Images are float (N, C, H, W) in [0, 1].

`default_augment` is what `fit` uses without being told otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import kornia.augmentation as K
import torch
from jaxtyping import Float, Int
from kornia.augmentation.auto import RandAugment as KorniaRandAugment
from kornia.constants import DataKey, Resample
from torch import Tensor, nn

from opsin.data import IGNORE, Boxes
from opsin.errors import BadInput

Transform = Callable[[Tensor, Any], tuple[Tensor, Any]]
SMALL = 64  # images up to this side are cropped with padding instead of resized


class Augment(nn.Module):
    """Steps that change images and leave their targets alone."""

    def __init__(self, *steps: nn.Module):
        super().__init__()
        self.steps = nn.Sequential(*steps)

    def forward(self, images: Float[Tensor, "n c h w"], targets: Any = None) -> tuple[Float[Tensor, "n c H W"], Any]:
        return self.steps(images), targets


def crop_and_pad(size: tuple[int, int], padding: int) -> nn.Module:
    """A window of `size` anywhere in the image padded with zeros."""
    return K.RandomCrop(size, padding=padding)


def flip(p: float = 0.5) -> K.AugmentationBase2D:
    """Left-right mirroring of a share of the images."""
    return K.RandomHorizontalFlip(p=p)


def random_resized_crop(size: tuple[int, int], scale: tuple[float, float] = (0.25, 1.0)) -> nn.Module:
    """A window of a random share of the area and an aspect of 3:4 to 4:3, resized to `size`."""
    return K.RandomResizedCrop(size, scale=scale, align_corners=False)


def erase(p: float = 0.25) -> nn.Module:
    """Random erasing (Zhong et al. 2020): a rectangle of 2 to 33 % of the area becomes zero."""
    return K.RandomErasing(p=p)


class ColourJitter(nn.Module):
    """Random brightness, contrast, saturation and hue, each factor uniform in 1 +- strength (hue: +- hue turns).

    Of grey images only brightness and contrast change.
    """

    def __init__(self, strength: float = 0.4, hue: float = 0.1):
        super().__init__()
        self.colour = K.ColorJitter(strength, strength, strength, hue)
        self.grey = nn.Sequential(
            K.RandomBrightness((1 - strength, 1 + strength)), K.RandomContrast((1 - strength, 1 + strength))
        )

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return (self.grey if images.shape[1] == 1 else self.colour)(images).clamp(0, 1)


class RandAugment(nn.Module):
    """RandAugment (Cubuk et al. 2020): `count` operations drawn for the batch, at magnitude 0 to 30 of kornia's scale.

    Grey images go through as colour and come back as the mean of the channels.
    """

    def __init__(self, count: int = 2, magnitude: int = 9):
        super().__init__()
        self.policy = KorniaRandAugment(n=count, m=magnitude)

    def forward(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        changed = self.policy(images.expand(-1, 3, -1, -1)).clamp(0, 1)
        return changed.mean(1, keepdim=True) if images.shape[1] == 1 else changed


class JointMask(nn.Module):
    """Geometric steps that move images and their masks (N, H, W) together.

    Masks take the nearest class. Where the geometry looks outside of the image, the image is 0 and the mask IGNORE:
    classes travel as 1, 2, ..., so that kornia's filling with 0 can be told apart from class 0.
    """

    def __init__(self, *steps: K.AugmentationBase2D):
        super().__init__()
        nearest = {"resample": Resample.NEAREST, "align_corners": None}
        self.steps = K.AugmentationSequential(*steps, data_keys=["input", "mask"], extra_args={DataKey.MASK: nearest})

    def forward(
        self, images: Float[Tensor, "n c h w"], masks: Int[Tensor, "n h w"]
    ) -> tuple[Float[Tensor, "n c H W"], Int[Tensor, "n H W"]]:
        shifted = torch.where(masks == IGNORE, 0, masks + 1)[:, None].to(images.dtype)
        images, moved = self.steps(images, shifted)
        classes = moved[:, 0].round().long()
        return images, torch.where(classes == 0, IGNORE, classes - 1)


class Dihedral(nn.Module):
    """One of the eight flips and quarter turns for each pair of degraded and clean image (turns: of squares only)."""

    def forward(
        self, images: Float[Tensor, "n c h w"], targets: Float[Tensor, "n c H W"]
    ) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n c H W"]]:
        draws = torch.rand(3, len(images)) < 0.5
        draws[2] &= images.shape[-1] == images.shape[-2]
        return self.turned(images, draws), self.turned(targets, draws)

    @staticmethod
    def turned(images: Tensor, draws: Tensor) -> Tensor:
        """Mirrors, flips and transposes the images whose bit is set in the rows of draws (3, N)."""
        mirror, upside, transpose = draws.to(images.device)[:, :, None, None, None]
        images = torch.where(mirror, images.flip(-1), images)
        images = torch.where(upside, images.flip(-2), images)
        return torch.where(transpose, images.mT, images) if bool(draws[2].any()) else images


class FlipBoxes(nn.Module):
    """Left-right mirroring of half of the images with their boxes."""

    def forward(self, images: Float[Tensor, "n c h w"], targets: Sequence[Boxes]) -> tuple[Tensor, list[Boxes]]:
        width = images.shape[-1]
        chosen = torch.rand(len(images)) < 0.5
        images = torch.where(chosen.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images, [self.mirrored(t, width) if c else t for t, c in zip(targets, chosen.tolist(), strict=True)]

    @staticmethod
    def mirrored(target: Boxes, width: int) -> Boxes:
        """x becomes width - x, and the left edge stays the smaller one."""
        x0, y0, x1, y1 = target.boxes.unbind(1)
        return Boxes(torch.stack([width - x1, y0, width - x0, y1], 1), target.labels)


class Chain(nn.Module):
    """Transforms of images and targets in turn."""

    def __init__(self, *transforms: nn.Module):
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    def forward(self, images: Tensor, targets: Any = None) -> tuple[Tensor, Any]:
        for transform in self.transforms:
            images, targets = transform(images, targets)
        return images, targets


def normalise(
    images: Float[Tensor, "*n c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*n c h w"]:
    """(image - mean) / std per channel; a channel without spread is only shifted."""
    shift, spread = images.new_tensor(mean)[:, None, None], images.new_tensor(std)[:, None, None]
    return (images - shift) / torch.where(spread > 1e-6, spread, 1.0)


def denormalise(
    images: Float[Tensor, "*n c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "*n c h w"]:
    """The inverse of `normalise`."""
    shift, spread = images.new_tensor(mean)[:, None, None], images.new_tensor(std)[:, None, None]
    return images * torch.where(spread > 1e-6, spread, 1.0) + shift


def default_augment(task: str, size: tuple[int, int] | None, classes: Sequence[str] = ()) -> nn.Module:
    """The augmentation of a task for images of `size` (height, width; None where it varies).

    classify, images, pretrain: up to 64 pixels, a crop with an eighth of padding, else a random resized crop; mirrored,
    unless the classes' names are single characters (digits and letters change their meaning).
    segment: mirrored, scaled by 0.5 to 2 and moved by up to a tenth, together with the mask.
    detect: mirrored with the boxes. restore: flips and quarter turns.
    """
    match task:
        case "classify" | "images" | "pretrain":
            symmetric = not classes or not all(len(name) == 1 for name in classes)
            steps = [] if size is None else [_window(size)]
            return Augment(*steps, *([flip()] if symmetric else []))
        case "segment":
            zoom = K.RandomAffine(0.0, translate=(0.1, 0.1), scale=(0.5, 2.0), align_corners=False, p=1.0)
            return JointMask(flip(), zoom)
        case "detect":
            return FlipBoxes()
        case "restore":
            return Dihedral()
    raise BadInput(f"there is no augmentation for the task '{task}'")


def _window(size: tuple[int, int]) -> nn.Module:
    return crop_and_pad(size, max(size) // 8) if max(size) <= SMALL else random_resized_crop(size)
