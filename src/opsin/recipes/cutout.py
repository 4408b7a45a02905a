"""Cutout (DeVries and Taylor 2017, arXiv:1708.04552): hide one square of every training image, labels unchanged."""

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.recipes import Recipe


class Cutout(Recipe):
    """Sets a square of `size` (a share of the shorter side) to the image's mean; its centre is uniform, per image."""

    def __init__(self, size: float = 0.5, prob: float = 1.0):
        super().__init__()
        self.size, self.prob = size, prob

    def transform(
        self, images: Float[Tensor, "n c h w"], targets: Tensor, num_classes: int
    ) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        if self.prob == 0 or torch.rand(()) >= self.prob:
            return images, targets
        n, _, height, width = images.shape
        half = self.size * min(height, width) / 2
        y, x = torch.randint(height, (n, 1, 1, 1)), torch.randint(width, (n, 1, 1, 1))
        rows = (torch.arange(height)[:, None] - y + 0.5).abs() < half
        columns = (torch.arange(width) - x + 0.5).abs() < half
        hidden = (rows & columns).to(images.device)
        return torch.where(hidden, images.mean((2, 3), keepdim=True), images), targets
