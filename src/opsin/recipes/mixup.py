"""Mixup (Zhang et al. 2018, arXiv:1710.09412): blend two images and their labels, lambda ~ Beta(alpha, alpha)."""

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.recipes import Recipe
from opsin.recipes.mixing import soft


class Mixup(Recipe):
    """x = lambda x_a + (1 - lambda) x_b, and the same for the labels. Args: alpha; prob, share of mixed batches."""

    def __init__(self, alpha: float = 1.0, prob: float = 1.0):
        super().__init__()
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.prob = prob

    def transform(
        self, images: Float[Tensor, "n c h w"], targets: Tensor, num_classes: int
    ) -> tuple[Float[Tensor, "n c h w"], Tensor]:
        if self.prob == 0 or torch.rand(()) >= self.prob:
            return images, targets
        order = torch.randperm(len(images)).to(images.device)
        lam = float(self.beta.sample())
        labels = soft(targets, num_classes)
        return torch.lerp(images[order], images, lam), torch.lerp(labels[order], labels, lam)
