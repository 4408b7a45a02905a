"""InceptionNeXt's claim: a large depthwise kernel can be mostly identity, nearly for free in accuracy and faster.

Exact: the mixer equals one dense depthwise convolution whose kernels are the embedded branches, at 31/8 of 49 of the
multiplications of a 7x7 one. Trained: the same small MetaNeXt on CIFAR-10 with four mixers. Timed: a training step.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import opsin
from opsin.backbones.inceptionnext import MetaNeXtBlock
from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.conv.depthwise import DepthwiseConv
from opsin.ops.conv.inception_depthwise import InceptionDepthwiseConv
from opsin.train.bare import accuracy, tensors, train

DIM, BLOCKS, BATCH = 48, 4, 64
STEPS_PER_SECOND = 26  # of the network below, on one core; sets how the budget is divided


class PartialConv(nn.Module):
    """A 3x3 depthwise convolution on an eighth of the channels, the others unchanged."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = DepthwiseConv(dim // 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.conv.in_channels
        return torch.cat((self.conv(x[:, :n]), x[:, n:]), 1)


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "depthwise 7x7": partial(DepthwiseConv, kernel_size=7),
    "depthwise 3x3": partial(DepthwiseConv, kernel_size=3),
    "partial 3x3": PartialConv,
    "inception": InceptionDepthwiseConv,
}


def network(mixer: Callable[[int], nn.Module], dim: int = DIM) -> nn.Module:
    """Four MetaNeXt blocks on 4x4 patches."""
    blocks = [MetaNeXtBlock(dim, mixer(dim), 4, 0.0, layer_scale=0.1) for _ in range(BLOCKS)]
    stem = nn.Sequential(nn.Conv2d(3, dim, 4, 4), nn.BatchNorm2d(dim))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, 10))


def step_times(rounds: int) -> dict[str, float]:
    """Median milliseconds of forward and backward of the network at width 96 on maps of 28x28, mixers in turn."""
    x = torch.randn(4, 3, 112, 112)
    networks = {name: network(build, 96) for name, build in MIXERS.items()}
    times: dict[str, list[float]] = {name: [] for name in MIXERS}
    for turn in range(rounds + 2):
        for name, model in networks.items():
            start = time.perf_counter()
            model(x).square().sum().backward()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def exact(experiment: Experiment) -> None:
    """One dense kernel, and its cost."""
    mixer, dense = InceptionDepthwiseConv(64), DepthwiseConv(64, 7)
    x = torch.randn(2, 64, 17, 23)
    with torch.no_grad():
        error = float((mixer(x) - mixer.reference(x)).abs().max())
    experiment.check("mixer less one dense depthwise kernel (max)", error, "<", 1e-5)
    ratio = count_macs(mixer, x) / count_macs(dense, x)
    experiment.check("multiplications over those of 7x7, less (31/8)/49", abs(ratio - 31 / 8 / 49), "<", 1e-9)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "inceptionnext",
        "Replacing the 7x7 depthwise mixer by square, bands and identity costs little accuracy and is faster.",
        data="CIFAR-10, 10,000 train / 2,000 test images", baseline="the same MetaNeXt with other mixers", seeds=seeds,
    )  # fmt: skip
    torch.manual_seed(0)
    exact(experiment)
    times = step_times(rounds=9)
    experiment.record("milliseconds of forward and backward", times)
    experiment.check("time of a step over that with 7x7", times["inception"] / times["depthwise 7x7"], "<", 1.0)

    data = opsin.data.open("cifar10")
    (x, y), (test_x, test_y) = tensors(data.train, 10_000), tensors(data.test, 2_000)
    x, test_x = (x - 0.47) / 0.25, (test_x - 0.47) / 0.25
    steps = max(20, int(budget.seconds * STEPS_PER_SECOND / (len(MIXERS) * budget.seeds)))
    scores: dict[str, list[float]] = {name: [] for name in MIXERS}
    for seed in seeds:
        for name, mixer in MIXERS.items():
            torch.manual_seed(seed)
            model = train(network(mixer), x, y, steps=steps, seed=seed, batch=BATCH)
            scores[name].append(accuracy(model, test_x, test_y))
    experiment.record("accuracy in percent", scores)
    experiment.compare("accuracy against 7x7 (points)", scores["inception"], scores["depthwise 7x7"], -0.7)
    experiment.compare("accuracy against partial 3x3 (points)", scores["inception"], scores["partial 3x3"], 0.0)
    return experiment.evidence(
        budget,
        notes=f"{steps} steps of batch {BATCH} ({steps * BATCH / len(x):.1f} epochs). Maps are 8x8, so "
        "the 11-wide bands see whole rows and columns.",
    )
