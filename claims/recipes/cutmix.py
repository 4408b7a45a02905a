"""CutMix's claim: training on pasted pairs generalises better than plain training, and at least as well as Cutout.

Exact: label shares are pixel shares. Trained: one small network on CIFAR-10, plain, Cutout, Mixup and CutMix with the
same batches; accuracy, the gap between train and test, and accuracy under a black box of 16 x 16 pixels.
"""

import torch
from torch import nn

import opsin
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.recipes.cutmix import CutMix
from opsin.train.bare import accuracy, tensors, train

RECIPES = ("plain", "cutout", "mixup", "cutmix")
STEPS_PER_SECOND = 26  # of the network below, on one core; sets how the budget is divided


def network() -> nn.Module:
    """Four convolutions, 0.08 M parameters and 3.4 M multiplications: small enough for twenty epochs of twelve runs."""

    def conv(dim_in: int, dim: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())

    return nn.Sequential(
        conv(3, 16, 2), conv(16, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), conv(64, 96),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10),
    )  # fmt: skip


def label_error() -> float:
    """The largest difference between a label's share and its pixels' share over 200 random batches."""
    images = torch.arange(1.0, 5)[:, None, None, None].expand(4, 1, 24, 40)
    worst = 0.0
    for _ in range(200):
        mixed, soft = CutMix().transform(images, torch.arange(4), 4)
        shares = torch.stack([(mixed == k + 1).float().mean((1, 2, 3)) for k in range(4)], 1)
        worst = max(worst, float((shares - soft).abs().max()))
    return worst


def occluded(images: torch.Tensor) -> torch.Tensor:
    hidden = images.clone()
    hidden[:, :, 8:24, 8:24] = 0
    return hidden


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "cutmix",
        "CutMix generalises better than plain training and at least as well as Cutout, with a smaller train-test gap.",
        data="CIFAR-10, 5,000 train / 2,000 test images", baseline="plain training, Cutout, Mixup", seeds=seeds,
    )  # fmt: skip
    experiment.check("label share less pixel share (max)", label_error(), "<", 1e-6)
    data = opsin.data.open("cifar10")
    (x, y), (test_x, test_y) = tensors(data.train, 5_000), tensors(data.test, 2_000)
    steps = max(20, int(budget.seconds * STEPS_PER_SECOND / (len(RECIPES) * budget.seeds)))
    scores: dict[str, dict[str, list[float]]] = {m: {r: [] for r in RECIPES} for m in ("test", "gap", "occluded")}
    for name in RECIPES:
        for seed in seeds:
            torch.manual_seed(seed)
            recipe = None if name == "plain" else opsin.create(name, prob=0.5 if name == "cutmix" else 1.0)
            mix = (lambda a, b, recipe=recipe: recipe.transform(a, b, 10)) if recipe else None
            model = train(network(), x, y, steps=steps, seed=seed, transform=mix)
            test = accuracy(model, test_x, test_y)
            scores["test"][name].append(test)
            scores["gap"][name].append(accuracy(model, x[:2000], y[:2000]) - test)
            scores["occluded"][name].append(accuracy(model, occluded(test_x), test_y))
    experiment.record("percent", scores)
    experiment.compare("accuracy against plain (points)", scores["test"]["cutmix"], scores["test"]["plain"], 1.0)
    experiment.compare("accuracy against Cutout (points)", scores["test"]["cutmix"], scores["test"]["cutout"], 0.0)
    half = [gap / 2 for gap in scores["gap"]["plain"]]
    experiment.compare("half of plain's gap less CutMix's (points)", half, scores["gap"]["cutmix"], 0.0)
    experiment.compare(
        "occluded accuracy against plain", scores["occluded"]["cutmix"], scores["occluded"]["plain"], 0.0
    )
    epochs = steps * 128 / len(x)
    return experiment.evidence(
        budget,
        notes=f"{steps} steps of batch 128 ({epochs:.1f} epochs); the paper trains for 300 epochs, and short schedules "
        "favour plain training.",
    )
