"""TrAct's claim: the first layer learns faster, so that short trainings end where longer plain ones do.

Exact: both formulas agree and solve the damped least squares. Trained: a small ResNet and a small ViT on CIFAR-10 by
SGD with one cosine cycle, the learning rate chosen for each side on other images and another seed; plain training also
with a quarter more epochs.
"""

import time
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.backbones.resnet import BasicBlock, ResNet
from opsin.backbones.vit import VisionTransformer
from opsin.layers.tract import FirstLayerHook, by_covariance, by_woodbury
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, flip_and_shift, tensors

SIDE, BATCH, EPOCHS, TUNING_EPOCHS = 16, 128, 8, 4
RATES = (0.02, 0.05, 0.1)
Images = tuple[Tensor, Tensor]


def resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1), (16, 32, 64), stem="cifar", num_classes=10)


def vit() -> nn.Module:
    return VisionTransformer(image_size=SIDE, patch_size=4, dim=64, depth=3, num_heads=4, num_classes=10)


@cache
def data() -> tuple[Images, Images, Images]:
    """10,000 images to train on, 2,000 to choose the rate on and 2,000 to test, 16x16, standardised per channel."""
    source = opsin.data.open("cifar10")
    x, y = tensors(source.train, 12000)
    test, labels = tensors(source.test, 2000)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    x, test = (F.avg_pool2d((images - mean) / std, 32 // SIDE) for images in (x, test))
    return (x[:10000], y[:10000]), (x[10000:], y[10000:]), (test, labels)


def trained(make: Callable[[], nn.Module], tract: bool, seed: int, epochs: float, rate: float) -> nn.Module:
    """SGD with momentum 0.9 and one cosine cycle; batches and fresh weights depend on the seed alone."""
    (images, labels), _, _ = data()
    torch.manual_seed(seed)
    net = make().train()
    hook = FirstLayerHook(net) if tract else None
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    steps = round(epochs * (len(images) // BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.Generator().manual_seed(seed)
    rows: Tensor = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        rows = rows if len(rows) >= BATCH else torch.randperm(len(images), generator=order)
        batch, rows = rows[:BATCH], rows[BATCH:]
        torch.manual_seed(seed * 1_000_003 + step)
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(net(flip_and_shift(images[batch], 1)), labels[batch]).backward()
        optimiser.step()
        schedule.step()
    if hook is not None:
        hook.remove()
    return net.eval()


def exact(experiment: Experiment) -> None:
    worst, ridge = 0.0, 0.0
    draw = np.random.default_rng(0)
    for count in (5, 30):
        g, x = draw.standard_normal((count, 4)), draw.standard_normal((count, 8))
        grad, rows = torch.tensor(g.T @ x)[None], torch.tensor(x)[None]
        left, right = by_covariance(grad, rows.mT @ rows / count, 0.1)[0], by_woodbury(grad, rows, 0.1)[0]
        solved = np.linalg.solve(x.T @ x / count + 0.1 * np.eye(8), x.T @ g).T
        worst = max(worst, float((left - right).abs().max()))
        ridge = max(ridge, float(np.abs(left.numpy() - solved).max()))
    experiment.check("both formulas, fewer and more rows than columns (max difference)", worst, "<", 1e-8)
    experiment.check("against a ridge solve by numpy (max difference)", ridge, "<", 1e-8)


def overhead(make: Callable[[], nn.Module]) -> float:
    """Median time of a training step with TrAct over that of one without, alternating."""
    (images, labels), _, _ = data()
    nets = [make().train(), make().train()]
    FirstLayerHook(nets[1])
    times: list[list[float]] = [[], []]
    for _ in range(15):
        for net, series in zip(nets, times):
            start = time.perf_counter()
            F.cross_entropy(net(images[:BATCH]), labels[:BATCH]).backward()
            series.append(time.perf_counter() - start)
    plain, ours = (float(np.median(series[3:])) for series in times)
    return ours / plain


def best_rate(make: Callable[[], nn.Module], tract: bool) -> float:
    _, chosen_on, _ = data()
    return max(RATES, key=lambda rate: accuracy(trained(make, tract, 100, TUNING_EPOCHS, rate), *chosen_on))


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(3, budget.seeds))
    experiment = Experiment(
        "tract",
        "A short training with TrAct is a point better than without, and as good as one that is a quarter longer.",
        data=f"CIFAR-10, 10,000 images of {SIDE}x{SIDE} to train on, 2,000 to test",
        baseline="the same training without TrAct, and with a quarter more epochs", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    for name, make in (("ResNet", resnet), ("ViT", vit)):
        rates = {tract: best_rate(make, tract) for tract in (False, True)}
        experiment.record(f"{name}: learning rate, plain and TrAct", [rates[False], rates[True]])
        score = partial(_score, make, rates)
        ours, plain = ([score(tract, seed, EPOCHS) for seed in seeds] for tract in (True, False))
        longer = [score(False, seed, 1.25 * EPOCHS) for seed in seeds]
        experiment.compare(f"{name}: accuracy in points over equal epochs", ours, plain, 1.0)
        experiment.compare(f"{name}: accuracy in points over 1.25 times the epochs", ours, longer, -0.3)
        experiment.record(f"{name}: time of a step over the plain one", overhead(make))
    notes = (
        f"lambda 0.1; {EPOCHS} epochs of batches of {BATCH}; rates from {RATES}, chosen by {TUNING_EPOCHS} epochs. "
        "ResNet of 3 blocks (widths 16 to 64) with a 3x3 stem, ViT of 3 blocks of 64 with patches of 4x4. Images "
        "are averaged down to 16x16 to keep the claim short; the paper trains 100 epochs and more at 32x32"
    )
    return experiment.evidence(budget, notes)


def _score(make: Callable[[], nn.Module], rates: dict[bool, float], tract: bool, seed: int, epochs: float) -> float:
    return accuracy(trained(make, tract, seed, epochs, rates[tract]), *data()[2])
