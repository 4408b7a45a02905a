"""The bare loop: a few lines of AdamW on tensors in memory, for claims that compare two ways of training.

`fit` is for users; here nothing but the two sides of a comparison can differ.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.data import Split

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def tensors(split: Split, count: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, " n"]]:
    """The first `count` samples of a classification split."""
    pairs = [split[i] for i in range(min(count, len(split)))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([int(label) for _, label in pairs])


def flip_and_shift(images: Float[Tensor, "n c h w"], pixels: int = 2) -> Float[Tensor, "n c h w"]:
    """Mirrors half of the images and moves each by up to `pixels`, with zeros coming in."""
    n, _, height, width = images.shape
    flip = torch.rand(n, 1, 1, 1) < 0.5
    images = F.pad(torch.where(flip, images.flip(3), images), [pixels] * 4)
    rows = torch.arange(height) + torch.randint(2 * pixels + 1, (n, 1))
    columns = torch.arange(width) + torch.randint(2 * pixels + 1, (n, 1))
    return images[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(
    model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"], *, steps: int, seed: int,
    batch: int = 128, lr: float = 2e-3, weight_decay: float = 0.05, augment: bool = True,
    transform: Transform | None = None,
) -> nn.Module:  # fmt: skip
    """AdamW with one cosine cycle and a tenth of warm-up; the batches depend on the seed alone.

    transform: (images, labels) of a batch -> what is trained on; labels may be indices or rows of probabilities.
    Returns the model, in eval mode.
    """
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay)
    warm = max(0.1, 2 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=warm)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(images), (batch,), generator=order)
        x, y = images[rows], labels[rows]
        x = flip_and_shift(x) if augment else x
        x, y = transform(x, y) if transform else (x, y)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Float[Tensor, "n c h w"], labels: Int[Tensor, " n"]) -> float:
    """Percent of right answers, in eval mode."""
    model.eval()
    hits = [(model(x).argmax(1) == y).float().sum() for x, y in zip(images.split(500), labels.split(500))]
    return 100 * float(torch.stack(hits).sum()) / len(images)
