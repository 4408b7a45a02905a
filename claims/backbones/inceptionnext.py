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
from torch.nn import functional as F

import opsin
from opsin.backbones.inceptionnext import MetaNeXtBlock
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.conv.depthwise import DepthwiseConv
from opsin.ops.conv.inception_depthwise import InceptionDepthwiseConv

DIM, BLOCKS, BATCH = 64, 4, 128


class PartialConv(nn.Module):
    """A 3x3 depthwise convolution on an eighth of the channels, the others unchanged (table 6 of the paper)."""

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


def network(mixer: Callable[[int], nn.Module]) -> nn.Module:
    blocks = [MetaNeXtBlock(DIM, mixer(DIM), 4, 0.0, layer_scale=0.1) for _ in range(BLOCKS)]
    stem = nn.Sequential(nn.Conv2d(3, DIM, 4, 4), nn.BatchNorm2d(DIM))
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(DIM, 10))


def step(model: nn.Module, optimiser: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), y).backward()
    optimiser.step()


def accuracy_after(mixer: str, seed: int, epochs: int, train: tuple, test: tuple) -> float:
    """Percent on the test images after AdamW with a cosine, the same for every mixer of a seed."""
    torch.manual_seed(seed)
    model = network(MIXERS[mixer])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    order = torch.Generator().manual_seed(seed)
    steps = epochs * (len(train[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(train[0]), generator=order).split(BATCH)[: len(train[0]) // BATCH]:
            x = train[0][rows]
            x = x.flip(3) if torch.rand((), generator=order) < 0.5 else x
            step(model, optimiser, x, train[1][rows])
            schedule.step()
    model.eval()
    with torch.no_grad():
        hits = [(model(x).argmax(1) == y).float().mean() for x, y in zip(test[0].split(500), test[1].split(500))]
    return 100 * float(torch.stack(hits).mean())


def step_times(rounds: int) -> dict[str, float]:
    """Median milliseconds of a training step at width 96 on 56x56 maps, mixers in turn."""
    dim = 96
    x = torch.randn(8, dim, 56, 56)
    times: dict[str, list[float]] = {name: [] for name in MIXERS}
    mixers = {name: build(dim) for name, build in MIXERS.items()}
    for turn in range(rounds + 2):
        for name, mixer in mixers.items():
            start = time.perf_counter()
            mixer(x).square().sum().backward()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def tensors(split: opsin.data.Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [split[i] for i in range(count)]
    images = (torch.stack([image for image, _ in pairs]) - 0.47) / 0.25
    return images, torch.tensor([label for _, label in pairs])


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "inceptionnext",
        "Replacing the 7x7 depthwise mixer by square, bands and identity costs little accuracy and is faster.",
        data="CIFAR-10, 10,000 train / 2,000 test images", baseline="the same MetaNeXt with other mixers", seeds=seeds,
    )  # fmt: skip
    mixer = InceptionDepthwiseConv(DIM)
    x = torch.randn(2, DIM, 17, 23)
    error = float((mixer(x) - mixer.reference(x)).abs().max())
    experiment.check("equals one dense depthwise kernel (max error)", error, "<", 1e-5)
    taps = sum(p.numel() for name, p in mixer.named_parameters() if name.endswith("weight")) / DIM
    experiment.check("multiplications over those of 7x7, less (31/8)/49", abs(taps / 49 - 31 / 8 / 49), "<", 1e-9)

    times = step_times(rounds=15)
    experiment.record("milliseconds of forward and backward", times)
    experiment.check("time of a step over that of 7x7", times["inception"] / times["depthwise 7x7"], "<", 1.0)

    data = opsin.data.open("cifar10")
    train, test = tensors(data.train, 10_000), tensors(data.test, 2_000)
    epochs = max(1, round(budget.seconds / 60))
    scores = {name: [accuracy_after(name, seed, epochs, train, test) for seed in seeds] for name in MIXERS}
    experiment.record("accuracy in percent", scores)
    experiment.compare("accuracy against 7x7 (points)", scores["inception"], scores["depthwise 7x7"], -0.7)
    experiment.compare("accuracy against partial 3x3 (points)", scores["inception"], scores["partial 3x3"], 0.0)
    return experiment.evidence(budget, notes=f"{epochs} epochs of AdamW with one cosine cycle, batch {BATCH}")
