"""ZeroQ's claim: images distilled from batch norms stand in for data when a network is quantised.

A small convolutional network on CIFAR-10, quantised with distilled images, Gaussian noise and real images: how well
each ranks the layers by sensitivity, what the Pareto allocation is worth against uniform and random ones, and 8 bits.
"""

from copy import deepcopy

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import opsin
from opsin.compress import Budget
from opsin.compress.bit_allocation import sensitivities
from opsin.compress.distilled_data import distil
from opsin.compress.zeroq import ZeroQ, quantisable, quantise_weights
from opsin.layers.normalize import Normalize
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, tensors, train

CHOICES = (2, 3, 4)


class Residual(nn.Module):
    """Two convolutions with batch norms beside an identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(x + self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))


def network() -> nn.Module:
    """Twelve layers with weights: a thin residual net."""

    def down(dim_in: int, dim: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(dim_in, dim, 3, 2, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU())

    return nn.Sequential(
        Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)), down(3, 16), Residual(16), Residual(16), down(16, 32),
        Residual(32), Residual(32), down(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def with_bits(model: nn.Module, bits: dict[str, int]) -> nn.Module:
    copy = deepcopy(model).eval()
    quantise_weights(copy, bits)
    return copy


def random_allocation(sizes: dict[str, int], average: float, rng: np.random.Generator) -> dict[str, int]:
    """Bits drawn at random, then nudged until their average is at most the wanted one and close to it."""
    names, total = list(sizes), sum(sizes.values())
    bits = {name: int(rng.choice((2, 4, 8))) for name in names}
    for _ in range(1000):
        mean = sum(bits[n] * sizes[n] for n in names) / total
        if average - 0.3 <= mean <= average:
            break
        name = names[rng.integers(len(names))]
        bits[name] = {2: 4, 4: 8, 8: 8}[bits[name]] if mean < average else {2: 2, 4: 2, 8: 4}[bits[name]]
    return bits


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "zeroq",
        "Distilled images rank layers by sensitivity better than noise does; Pareto bits beat uniform and random ones "
        "of the same size; 8 bits without data cost at most a point.",
        data="CIFAR-10, 10,000 train / 2,000 test images", baseline="Gaussian noise; uniform and random bits",
        seeds=seeds,
    )  # fmt: skip
    data = opsin.data.open("cifar10")
    (x, y), test = tensors(data.train, 10_000), tensors(data.test, 2_000)
    rank: dict[str, list[float]] = {"distilled": [], "noise": []}
    scores: dict[str, list[float]] = {n: [] for n in ("float", "w8a8", "pareto 4", "uniform 4", "random 4")}
    steps = max(20, int(budget.seconds / budget.seeds * 6))
    for seed in seeds:
        torch.manual_seed(seed)
        model = train(network(), x, y, steps=steps, seed=seed)
        layers = quantisable(model)
        images = {
            "distilled": distil(model, (32, 3, 32, 32), steps=200, seed=seed)[0],
            "noise": 0.47 + 0.25 * torch.randn(32, 3, 32, 32),
            "real": x[:512],
        }
        omega = {n: sensitivities(model, list(layers.values()), i, CHOICES) for n, i in images.items()}
        for name in rank:
            rank[name].append(float(np.mean([spearmanr(omega[name][:, j], omega["real"][:, j])[0] for j in (0, 1)])))
        scores["float"].append(accuracy(model, *test))
        shape = (3, 32, 32)
        eight = ZeroQ(choices=(8,), steps=200, input_size=shape, seed=seed)(model)
        scores["w8a8"].append(accuracy(eight.model, *test))
        mixed = ZeroQ(choices=(2, 4, 8), steps=200, input_size=shape, seed=seed)(model, None, Budget(bits=4.0))
        scores["pareto 4"].append(accuracy(with_bits(model, mixed.report.details["bits"]), *test))
        scores["uniform 4"].append(accuracy(with_bits(model, dict.fromkeys(layers, 4)), *test))
        sizes, rng = {n: m.weight.numel() for n, m in layers.items()}, np.random.default_rng(seed)
        draws = [accuracy(with_bits(model, random_allocation(sizes, 4.0, rng)), *test) for _ in range(10)]
        scores["random 4"].append(float(np.mean(draws)))
    experiment.record("rank correlation with real images", rank)
    experiment.record("percent", scores)
    experiment.compare("rank correlation, distilled", rank["distilled"], [0.0] * len(rank["distilled"]), 0.85)
    experiment.compare("rank correlation over noise", rank["distilled"], rank["noise"], 0.03)
    experiment.compare("Pareto over uniform 4 bits (points)", scores["pareto 4"], scores["uniform 4"], 1.0)
    experiment.compare("Pareto over random bits (points)", scores["pareto 4"], scores["random 4"], 1.0)
    experiment.compare("W8A8 less float (points)", scores["w8a8"], scores["float"], -1.0)
    return experiment.evidence(
        budget,
        notes=f"{steps} training steps, 200 distillation steps, 10 random allocations; sensitivities at 2 and 3 bits; "
        "the bit allocations are compared with float activations.",
    )
