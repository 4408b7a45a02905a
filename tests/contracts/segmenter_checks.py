"""What every segmenter must pass, one function per point. Each raises AssertionError that says what is wrong."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from opsin.data import IGNORE, Data
from opsin.tasks import Masks, TaskModel
from opsin.tasks.segment import Segment

Build = Callable[..., TaskModel]  # build(**overrides) -> a small member
CLASSES = 4


def scene(side: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A noisy image of coloured rectangles on a ground, and its labels, with an ignored frame."""
    labels = torch.zeros(side, side, dtype=torch.long)
    for label in range(1, CLASSES):
        top, left = (int(v) for v in torch.randint(2, side // 2, (2,), generator=random))
        height, width = (int(v) for v in torch.randint(side // 4, side // 2, (2,), generator=random))
        labels[top : top + height, left : left + width] = label
    colours = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.3, 0.3, 0.9]])
    image = colours[labels].permute(2, 0, 1) + 0.05 * torch.randn(3, side, side, generator=random)
    labels[:2] = labels[-2:] = IGNORE
    return image.clamp(0, 1), labels


def scenes(count: int = 8, side: int = 48) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    pairs = [scene(side, random) for _ in range(count)]
    return torch.stack([image for image, _ in pairs]), torch.stack([labels for _, labels in pairs])


def data() -> Data:
    names = tuple(f"c{i}" for i in range(CLASSES))
    return Data("scenes", "segment", {"train": list(zip(*scenes()))}, names, 3, (48, 48), (0.4,) * 3, (0.3,) * 3)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def reference_miou(predicted: np.ndarray, truth: np.ndarray, classes: int) -> float:
    """Intersection over union by counting, one class after the other."""
    known = truth != IGNORE
    ious = []
    for label in range(classes):
        ours, theirs = (predicted == label) & known, (truth == label) & known
        if (ours | theirs).any():
            ious.append((ours & theirs).sum() / (ours | theirs).sum())
    return float(np.mean(ious))


def losses_or_masks(build: Build) -> None:
    """Finite scalar losses that reach the network with targets; masks of the image's size without."""
    model = build(num_classes=CLASSES)
    images, targets = scenes(2)
    losses = model(images, targets)
    assert isinstance(losses, dict) and losses, "no losses by name"
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values()), "a loss is no finite scalar"
    total(losses).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained), "a trained parameter gets no gradient"
    masks = model.eval()(images)
    assert isinstance(masks, Masks), "no Masks"
    assert masks.logits.shape == (2, CLASSES, 48, 48), f"logits of shape {tuple(masks.logits.shape)}"
    assert masks.labels.shape == (2, 48, 48) and masks.labels.dtype == torch.long


@torch.no_grad()
def any_size(build: Build) -> None:
    """Odd sides, and sides below the stride."""
    model = build(num_classes=CLASSES).eval()
    for height, width in ((37, 61), (64, 33), (9, 20)):
        shape = model(torch.rand(1, 3, height, width)).logits.shape
        assert shape == (1, CLASSES, height, width), f"{tuple(shape)} for {height}x{width}"


def ignored_pixels(build: Build) -> None:
    """Pixels of class 255 contribute nothing: neither to the loss's value, nor to its mean, nor to gradients."""
    model = build(num_classes=CLASSES).eval()
    images, targets = scenes(2)
    alone = total(model(images[:1], targets[:1])).item()
    targets[1] = IGNORE
    together = total(model(images, targets)).item()
    assert abs(together - alone) <= 1e-4 * abs(alone), f"an ignored image moves the loss from {alone} to {together}"
    loss = total(model(images, torch.full_like(targets, IGNORE)))
    loss.backward()
    assert loss.item() == 0, f"without any class the loss is {loss.item()}"
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters()), "ignored pixels give gradients"


@torch.no_grad()
def independent_samples(build: Build) -> None:
    """In eval, an image's masks do not depend on what else is in the batch."""
    model = build(num_classes=CLASSES).eval()
    images = scenes(2)[0]
    together, alone = model(images).logits[0], model(images[:1]).logits[0]
    assert torch.allclose(together, alone, atol=1e-5 + 1e-4 * float(alone.abs().max())), "the batch changes an image"
    assert not torch.equal(model(images).logits[1], together), "the image does not matter"


@torch.no_grad()
def round_trip(build: Build) -> None:
    """A second instance with the first one's state is the first one."""
    first, second = build(num_classes=CLASSES).train(), build(num_classes=CLASSES).eval()
    images = scenes(4)[0]
    first(images)  # moves running statistics
    assert not torch.equal(second(images).logits, first.eval()(images).logits), "fresh instances are the same"
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(second(images).logits, first(images).logits), "something is not in the state"


def overfits(build: Build, steps: int = 40) -> None:
    """Eight images are learned by heart, up to the edges that a coarse map cannot place."""
    model = build(num_classes=CLASSES).train()
    images, targets = scenes()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        total(model(images, targets)).backward()
        optimizer.step()
    task = Segment()
    metric = task.metric(data())
    with torch.no_grad():
        predictions = model.eval()(images)
    task.update_metric(metric, predictions, targets)
    score = metric.compute().item()
    assert score > 0.7, f"eight images are learned to {score:.2f} mIoU only"


def metric_agrees(make: Callable[[], Metric]) -> None:
    """The metric over several batches is the reference over all pixels; ignored pixels do not count."""
    task, metric = Segment(), make()
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(6, CLASSES, 15, 11, generator=random)
    logits[:, 3] -= 9  # a class that is never predicted
    truth = torch.randint(0, CLASSES - 1, (6, 15, 11), generator=random)
    truth[0] = 0  # images of unlike class shares
    truth[:, :3] = IGNORE
    for part in (slice(0, 1), slice(1, 6)):
        task.update_metric(metric, Masks(logits[part]), truth[part])
    expected = reference_miou(logits.argmax(1).numpy(), truth.numpy(), CLASSES)
    assert abs(metric.compute().item() - expected) < 1e-6, f"{metric.compute().item()} instead of {expected}"


ALWAYS = (losses_or_masks, any_size, ignored_pixels, independent_samples, round_trip, overfits)
