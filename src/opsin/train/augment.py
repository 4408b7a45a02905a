"""Shift and mirror, until the data room's own augmentation is there."""

import torch
from torch import Tensor

from opsin.data import Data


class Shift:
    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        n, _, height, width = images.shape
        pixels = max(1, min(height, width) // 8)
        padded = torch.nn.functional.pad(images, [pixels] * 4)
        rows = torch.arange(height, device=images.device) + torch.randint(2 * pixels + 1, (n, 1), device=images.device)
        columns = torch.arange(width, device=images.device) + torch.randint(
            2 * pixels + 1, (n, 1), device=images.device
        )
        index = torch.arange(n, device=images.device)[:, None, None]
        return padded[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), targets


def default_augment(data: Data) -> Shift | None:
    return Shift() if data.task == "classify" else None
