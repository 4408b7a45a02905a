"""What the winner does on test images: predictions, confusions, and samples with explanations."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from opsin.catalog import create
from opsin.data import Split
from opsin.errors import OpsinError, UnknownName
from opsin.explain import Explanation

SMALLEST_AREA = 32  # pixels; below, Salient Relevance's patches of 7x7 would cover the image
AREAS = "the areas that mattered for the predicted class (red), by Salient Relevance"
SIGNED = "what spoke for the predicted class (red) and against it (blue), by {}"
SIDE = 160  # pixels that a sample's picture has at least
FOR, AGAINST = np.array([208.0, 62.0, 62.0]), np.array([59.0, 111.0, 212.0])  # colours of relevance


@dataclass(frozen=True)
class Sample:
    """One test image: pictures as data addresses, the names of the classes, the probability of the predicted one."""

    image: str
    explanation: str
    true: str
    predicted: str
    probability: float

    @property
    def right(self) -> bool:
        return self.true == self.predicted


@dataclass(frozen=True)
class Samples:
    """caption: what the explanations show, and by which method; reason: why not by another, if so."""

    shown: list[Sample]
    caption: str
    reason: str = ""


@dataclass(frozen=True)
class Answers:
    """A classifier's answers on a split, in its order."""

    targets: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    probabilities: Float[Tensor, " n"]

    @property
    def accuracy(self) -> float:
        return (self.targets == self.labels).float().mean().item()

    def confusion(self, classes: int) -> Int[Tensor, "k k"]:
        """Counts: rows are the true classes, columns the predicted ones."""
        flat = self.targets * classes + self.labels
        return torch.bincount(flat, minlength=classes * classes).view(classes, classes)


@torch.no_grad()
def answers(model: nn.Module, split: Split, batch_size: int = 256) -> Answers:
    """Runs a classifier over a split of images of one size."""
    model.eval()
    targets, labels, probabilities = [], [], []
    for start in range(0, len(split), batch_size):
        pairs = [split[i] for i in range(start, min(start + batch_size, len(split)))]
        best = model(torch.stack([image for image, _ in pairs])).logits.float().softmax(1).max(1)
        targets.append(torch.tensor([int(target) for _, target in pairs]))
        labels.append(best.indices)
        probabilities.append(best.values)
    return Answers(torch.cat(targets), torch.cat(labels), torch.cat(probabilities))


def choose(found: Answers, wrong: int = 6, right: int = 6) -> list[int]:
    """The wrong answers that were given with most confidence, and the right ones with least: where the net is weak."""
    hit = found.targets == found.labels
    misses = sorted((~hit).nonzero().flatten().tolist(), key=lambda i: -found.probabilities[i].item())
    hits = sorted(hit.nonzero().flatten().tolist(), key=lambda i: found.probabilities[i].item())
    return misses[:wrong] + hits[:right]


def explained_samples(
    model: nn.Module, split: Split, found: Answers, indices: Sequence[int], classes: Sequence[str]
) -> Samples:
    """Samples with an explanation of the predicted class each.

    By Salient Relevance; by its first step, layer-wise relevance propagation, where images are too small for areas; by
    gradient x input where neither works for the network.
    """
    images = [split[i][0] for i in indices]
    labels = [int(found.labels[i]) for i in indices]
    if not images:
        return Samples([], "")
    maps, caption, reason = _explain(model.eval(), images, labels)
    items = [
        Sample(
            _address(_pixels(image)), _address(_overlay(image, relevance)), classes[int(found.targets[i])],
            classes[label], found.probabilities[i].item(),
        )
        for i, image, label, relevance in zip(indices, images, labels, maps, strict=True)
    ]  # fmt: skip
    return Samples(items, caption, reason)


def _explain(model: nn.Module, images: list[Tensor], labels: list[int]) -> tuple[list[Tensor], str, str]:
    """Maps, the caption, and why another method was not used."""
    large = min(images[0].shape[-2:]) >= SMALLEST_AREA
    name = "salient_relevance" if large else "lrp"
    caption = AREAS if large else SIGNED.format("layer-wise relevance propagation")
    try:
        explain = create(name)
        return [explain(model, x, y).map for x, y in zip(images, labels, strict=True)], caption, ""
    except UnknownName:
        reason = f"the explainer {name} is not installed"
    except (OpsinError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = f"{name} does not work for this network: {str(error).splitlines()[0]}"
    maps = [gradient_times_input(model, x, y).map for x, y in zip(images, labels, strict=True)]
    return maps, SIGNED.format("gradient × input"), reason


def gradient_times_input(model: nn.Module, image: Float[Tensor, "c h w"], target: int) -> Explanation:
    """The first-order share of each pixel in the class score: sum over channels of x * df/dx."""
    with torch.enable_grad():
        x = image[None].clone().requires_grad_()
        prediction = model(x)
        logits = getattr(prediction, "logits", prediction)
        (gradient,) = torch.autograd.grad(logits[0, target], x)
    return Explanation((x * gradient)[0].sum(0).detach(), image, target, "gradient_times_input")


def _pixels(image: Float[Tensor, "c h w"]) -> NDArray[np.uint8]:
    """To (H, W, 3) bytes; one channel is shown as grey, of more than three the first three are shown."""
    shown = image.detach().clamp(0, 1)
    shown = shown.expand(3, -1, -1) if len(shown) < 3 else shown[:3]
    return (shown.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def _overlay(image: Float[Tensor, "c h w"], relevance: Float[Tensor, "h w"]) -> NDArray[np.uint8]:
    """The image in pale grey; red where evidence speaks for the class and blue where it speaks against it."""
    grey = 200 + 0.2 * _pixels(image).astype(np.float64).mean(2, keepdims=True)
    strength = relevance.detach().double().nan_to_num().numpy()
    scale = np.quantile(np.abs(strength), 0.99) or 1.0
    share = np.clip(strength / scale, -1, 1)[..., None]
    colour = np.where(share > 0, FOR, AGAINST)
    return (grey * (1 - np.abs(share)) + colour * np.abs(share)).round().astype(np.uint8)


def _address(pixels: NDArray[np.uint8]) -> str:
    """A PNG as a data address; small images are enlarged by whole pixels, so that they stay sharp."""
    times = max(1, -(-SIDE // max(pixels.shape[:2])))
    image = Image.fromarray(pixels).resize((pixels.shape[1] * times, pixels.shape[0] * times), Image.Resampling.NEAREST)
    image.thumbnail((2 * SIDE, 2 * SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def confused_pairs(confusion: Int[Tensor, "k k"], classes: Sequence[str], most: int = 5) -> list[tuple[str, str, int]]:
    """The commonest mistakes: true class, predicted class, how often."""
    off = confusion.clone().fill_diagonal_(0)
    counts, places = off.flatten().sort(descending=True, stable=True)
    k = len(classes)
    return [(classes[p // k], classes[p % k], c) for c, p in zip(counts.tolist()[:most], places.tolist()) if c]
