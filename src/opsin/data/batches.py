"""How the samples of a task become a batch.

| task     | images                          | targets                                               |
| -------- | ------------------------------- | ----------------------------------------------------- |
| classify | (N, C, H, W)                    | int64 (N,)                                            |
| images   | (N, C, H, W)                    | int64 (N,), zeros                                     |
| segment  | padded with 0 to the largest    | int64 (N, H, W), padded with IGNORE                   |
| detect   | padded with 0 to the largest    | list of `Boxes`; the padding is right and below       |
| restore  | (N, C, h, w)                    | (N, C, H, W)                                          |
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opsin.data import IGNORE, Boxes
from opsin.errors import BadInput

Samples = Sequence[tuple[Tensor, Any]]
Collate = Callable[[Samples], tuple[Tensor, Any]]


def collate(task: str) -> Collate:
    """The function that makes a batch of a task's samples; it can be sent to loader workers."""
    if task not in COLLATES:
        raise BadInput(f"there is no task '{task}' to make batches of; it is one of {', '.join(COLLATES)}")
    return COLLATES[task]


def labelled(samples: Samples) -> tuple[Tensor, Tensor]:
    """Images of one size, and a number each."""
    images = [image for image, _ in samples]
    _same_size(images, "open the data with size=, e.g. size=224, to bring them to one size")
    return torch.stack(images), torch.tensor([int(label) for _, label in samples])


def masked(samples: Samples) -> tuple[Tensor, Tensor]:
    """Images and masks, padded to the largest."""
    size = _largest([image for image, _ in samples])
    return _padded([i for i, _ in samples], size, 0.0), _padded([mask for _, mask in samples], size, IGNORE)


def boxed(samples: Samples) -> tuple[Tensor, list[Boxes]]:
    """Images padded to the largest, and the boxes of each."""
    images = [image for image, _ in samples]
    return _padded(images, _largest(images), 0.0), [boxes for _, boxes in samples]


def paired(samples: Samples) -> tuple[Tensor, Tensor]:
    """Degraded images and clean ones, each of one size."""
    hint = "open the data with crop=, e.g. crop=96, or use a batch size of 1"
    images, targets = [image for image, _ in samples], [target for _, target in samples]
    _same_size(images, hint)
    _same_size(targets, hint)
    return torch.stack(images), torch.stack(targets)


COLLATES: dict[str, Collate] = {
    "classify": labelled, "images": labelled, "segment": masked, "detect": boxed, "restore": paired,
}  # fmt: skip


def _same_size(images: Sequence[Tensor], hint: str) -> None:
    first = images[0].shape
    other = next((image.shape for image in images if image.shape != first), None)
    if other is not None:
        sizes = " and ".join(" x ".join(str(n) for n in (*reversed(shape[-2:]), shape[0])) for shape in (first, other))
        raise BadInput(f"the images of a batch differ in width x height x channels ({sizes}); {hint}")


def _largest(images: Sequence[Tensor]) -> tuple[int, int]:
    return max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)


def _padded(images: Sequence[Tensor], size: tuple[int, int], value: float) -> Tensor:
    return torch.stack(
        [F.pad(image, (0, size[1] - image.shape[-1], 0, size[0] - image.shape[-2]), value=value) for image in images]
    )
