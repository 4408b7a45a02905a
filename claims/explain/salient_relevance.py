"""Salient Relevance's claim: its maps show the attended object as an area, where LRP shows scattered pixels.

Scenes with a known answer: a handwritten digit of 24 pixels pasted on a 64 x 64 piece of a natural photo, and a small
network that reads it. The region that holds the top fifth of a map's mass is compared with the digit's box. Control:
LRP blurred by a Gaussian, at the best of several widths.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy.ndimage import gaussian_filter, label
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.explain.lrp import Epsilon, lrp_0, relevance, z_plus
from opsin.explain.salient_relevance import SalientRelevance
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, train

SIDE, DIGIT = 64, 24
BLURS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


def scenes(count: int, seed: int, split: str) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Images (n, 3, 64, 64), the digits in them, and the corner of each digit's box."""
    random = np.random.default_rng(seed)
    photos = opsin.data.open("bsds500").splits["train" if split == "train" else "test"]
    digits = opsin.data.open("digits").splits[split]
    views = [photos[int(i)][0] for i in random.permutation(len(photos))[:60]]
    images, labels, corners = [], [], []
    for _ in range(count):
        photo = views[random.integers(len(views))]
        top, left = (int(random.integers(side - SIDE)) for side in photo.shape[1:])
        scene = photo[:, top : top + SIDE, left : left + SIDE].clone()
        ink, digit = digits[int(random.integers(len(digits)))]
        ink = F.interpolate(ink[None], size=(DIGIT, DIGIT), mode="bilinear")[0]
        y, x = (int(random.integers(SIDE - DIGIT)) for _ in range(2))
        box = scene[:, y : y + DIGIT, x : x + DIGIT]
        box.copy_(box * (1 - ink) + torch.tensor([1.0, 0.9, 0.2])[:, None, None] * ink)
        images.append(scene)
        labels.append(int(digit))
        corners.append((y, x))
    return torch.stack(images), torch.tensor(labels), corners


def network() -> nn.Module:
    """Five convolutions with pooling, as in the VGG nets of the paper."""

    def conv(dim_in: int, dim: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(dim_in, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.ReLU(), nn.MaxPool2d(2))

    return nn.Sequential(
        conv(3, 16), conv(16, 32), conv(32, 48), conv(48, 64), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def region(map: Tensor) -> np.ndarray:
    """The pixels, taken from the highest down, that hold a fifth of the map's mass."""
    values = map.clamp(min=0).flatten().double()
    order = values.argsort(descending=True)
    count = int((values[order].cumsum(0) < 0.2 * values.sum()).sum()) + 1
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(map.shape).numpy()


def scores(maps: list[Tensor], corners: list[tuple[int, int]]) -> tuple[float, float]:
    """Mean intersection over union with the digit's box, and mean number of connected parts."""
    overlap, parts = [], []
    for map, (y, x) in zip(maps, corners, strict=True):
        mask, box = region(map), np.zeros((SIDE, SIDE), bool)
        box[y : y + DIGIT, x : x + DIGIT] = True
        overlap.append((mask & box).sum() / (mask | box).sum())
        parts.append(label(mask, structure=np.ones((3, 3)))[1])
    return float(np.mean(overlap)), float(np.mean(parts))


def blurred(maps: list[Tensor], sigma: float) -> list[Tensor]:
    return [torch.from_numpy(gaussian_filter(map.numpy(), sigma)) for map in maps]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.flatten().argsort().argsort().double() for t in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def conservation_error() -> float:
    """Largest relative difference between the sum of relevance and the logit, in a net without biases."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 49, 10, bias=False)
    ).double()
    x = torch.rand(3, 16, 16).double()
    logits = net(x[None])[0].detach()
    sums = torch.stack([relevance(net, x, k, conv=lrp_0, linear=z_plus)[0].sum() for k in range(10)])
    return float(((sums - logits) / logits).abs().max())


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "salient_relevance",
        "Salient relevance marks the attended object as an area: closer to its box and in fewer parts than LRP.",
        data="digits pasted on BSDS500 photos, 64 x 64, 3,000 train scenes", baseline="LRP, and LRP blurred",
        seeds=seeds,
    )  # fmt: skip
    experiment.check("relevance less logit, relative (max)", conservation_error(), "<", 1e-3)
    count = max(20, min(200, int(budget.seconds / 3)))
    names = ("sr", "lrp", *(f"lrp blurred {sigma:g} px" for sigma in BLURS))
    overlap: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in names}
    similar, right = [], []
    for seed in seeds:
        model, test, chosen = trained(seed)
        right.append(accuracy(model, test[0], test[1]))
        chosen = chosen[:count]
        images, corners = test[0][chosen], [test[2][i] for i in chosen]
        pixels = explain(lambda m, x, t: relevance(m, x, t, conv=Epsilon())[0].abs().sum(0), model, images)
        sr = explain(lambda m, x, t: SalientRelevance()(m, x, t).map, model, images)
        for name, maps in [("sr", sr), ("lrp", pixels), *((n, blurred(pixels, s)) for n, s in zip(names[2:], BLURS))]:
            iou, number = scores(maps, corners)
            overlap[name].append(iou)
            parts[name].append(number)
        torch.manual_seed(1000 + seed)
        fresh = explain(lambda m, x, t: SalientRelevance()(m, x, t).map, network(), images[:20])
        similar.append(float(np.mean([rank_correlation(a, b) for a, b in zip(sr, fresh, strict=False)])))
    experiment.record("intersection over union", overlap)
    experiment.record("connected parts", parts)
    experiment.record("percent of scenes read right", right)
    experiment.check("percent of scenes read right (least)", min(right), ">=", 90)
    experiment.compare("IoU of SR over LRP", overlap["sr"], overlap["lrp"], 0.05)
    best = max(names[2:], key=lambda name: np.mean(overlap[name]))
    experiment.compare(f"IoU of SR over {best}", overlap["sr"], overlap[best], 0.0)
    ratio = float(np.mean(parts["sr"]) / np.mean(parts["lrp"]))
    experiment.check("connected parts of SR over those of LRP", ratio, "<=", 0.5)
    experiment.record("rank correlation with fresh weights", similar)
    experiment.check("rank correlation with fresh weights", float(np.mean(similar)), "<", 0.5)
    return experiment.evidence(budget, notes=f"{count} rightly read test scenes per seed; rules Epsilon and z+")


def trained(seed: int) -> tuple[nn.Module, tuple[Tensor, Tensor, list[tuple[int, int]]], list[int]]:
    """A network trained on scenes, test scenes, and those of them that it reads right."""
    x, y, _ = scenes(3_000, seed, "train")
    test = scenes(300, 100 + seed, "test")
    torch.manual_seed(seed)
    model = train(network(), x, y, steps=1000, seed=seed, batch=64, augment=False)
    with torch.no_grad():
        hits = model(test[0]).argmax(1) == test[1]
    return model, test, hits.nonzero()[:, 0].tolist()


def explain(method: Callable[[nn.Module, Tensor, None], Tensor], model: nn.Module, images: Tensor) -> list[Tensor]:
    return [method(model, image, None) for image in images]
