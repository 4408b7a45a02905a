"""AP's claim: at equal sparsity, giving a tenth of each round to small-moving negative weights leaves fewer dead ReLUs
and a better network.

Exact: rounds take p - q and q, masks do not regrow, and the meter agrees with a count by hand. Trained: a small
convolutional network on CIFAR-10, rounds of 30 % of which AP has 3 %, down to 5.8 % of the weights; the host alone,
with AP, and with two controls in AP's place: random negative weights, and positive ones that hardly moved.
"""

from copy import deepcopy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import opsin
from opsin.compress.activate_while_pruning import ActivateWhilePruning, small_moving_negative
from opsin.compress.dead_neurons import dead_rates
from opsin.data import Data
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, tensors

RATE, SHARE, ROUNDS, EPOCHS, BATCH = 0.3, 0.03, 8, 6, 50
IMAGES, SIDE = 3000, 16


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32),
        nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
    return net


def photos() -> Data:
    """CIFAR-10, 3,000 images to train on and 2,000 to test, 16x16, standardised."""
    source = opsin.data.open("cifar10")
    splits = {}
    for name, split, count in (("train", source.train, IMAGES), ("test", source.test, 2000)):
        x, y = tensors(split, count)
        splits[name] = TensorDataset((nn.functional.avg_pool2d(x, 32 // SIDE) - 0.47) / 0.25, y)
    return Data("cifar10, small", "classify", splits, source.classes, 3, (SIDE, SIDE))


def random_negative(weight: Tensor, start: Tensor) -> Tensor:
    return torch.rand_like(weight).masked_fill(weight >= 0, torch.inf)


def small_moving_positive(weight: Tensor, start: Tensor) -> Tensor:
    return (weight - start).abs().masked_fill(weight <= 0, torch.inf)


ARMS = {
    "host": dict(share=0.0),
    "ap": dict(share=SHARE, choose=small_moving_negative),
    "random negative": dict(share=SHARE, choose=random_negative),
    "small-moving positive": dict(share=SHARE, choose=small_moving_positive),
}


def exact(experiment: Experiment, data: Data) -> None:
    tool = ActivateWhilePruning(rate=RATE, share=SHARE, epochs=0)
    net = network(0)
    total = sum(m.weight.numel() for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    masks, rounds = tool.prune(net, data, total // 3)
    wrong = sum(
        abs(entry["ap"] - round((entry["host"] + entry["ap"]) * SHARE / RATE)) + (entry["alive"] - after["alive"]
        - entry["host"] - entry["ap"]) for entry, after in pairwise(rounds)
    )  # fmt: skip
    experiment.check("weights that a round takes beyond p - q and q", wrong, "==", 0)
    experiment.check(
        "weights left over those asked for", sum(int(m.sum()) for m in masks.values()) - total // 3, "==", 0
    )
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(2, 3, bias=False), nn.ReLU())
    with torch.no_grad():
        tiny[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    rates = dead_rates(tiny, torch.tensor([[1.0, -1.0], [1.0, 1.0]]).view(2, 1, 1, 2))
    experiment.check("dynamic rate of a net of 3 units (1 of 6 by hand)", abs(rates.dynamic - 1 / 6), "<", 1e-12)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(5, budget.seeds))
    data = photos()
    experiment = Experiment(
        "activate_while_pruning",
        "Magnitude pruning with AP has fewer dynamically dead ReLUs and is a point better at over 90 % sparsity.",
        data=f"CIFAR-10, {len(data.train)} images of {SIDE}x{SIDE} to train on and {len(data.test)} to test",
        baseline="global magnitude pruning by the same rounds, and two controls in AP's place", seeds=seeds,
    )  # fmt: skip
    exact(experiment, data)
    test = tensors(data.test, len(data.test))
    scores: dict[str, list[float]] = {arm: [] for arm in ARMS}
    dead: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in seeds:
        fresh = network(seed)
        total = sum(m.weight.numel() for m in fresh.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        for arm, options in ARMS.items():
            net = deepcopy(fresh)
            tool = ActivateWhilePruning(rate=RATE, epochs=EPOCHS, batch_size=BATCH, lr=0.05, seed=seed, **options)
            tool.prune(net, data, round(total * (1 - RATE) ** ROUNDS))
            scores[arm].append(accuracy(net, *test))
            dead[arm].append(dead_rates(net, test[0]).dynamic)
    lower = sum(a < b for a, b in zip(dead["ap"], dead["host"]))
    experiment.check("seeds in which AP has the lower dynamic rate", lower, ">=", 0.8 * len(seeds))
    experiment.compare("accuracy in points over the host alone", scores["ap"], scores["host"], 1.0)
    for control in ("random negative", "small-moving positive"):
        experiment.compare(f"accuracy in points over {control}", scores["ap"], scores[control], 0.0)
    experiment.record("accuracy in points", scores)
    experiment.record("dynamic share of dead ReLUs", dead)
    notes = (
        f"{ROUNDS} rounds of {RATE:.0%}, AP's part {SHARE:.0%}, {EPOCHS} epochs of SGD 0.05 each, rewound to the first "
        f"weights; {100 * (1 - (1 - RATE) ** ROUNDS):.1f} % of about 15,600 weights pruned. Few and small images, so "
        "that four arms and five seeds of nine trainings fit into minutes"
    )
    return experiment.evidence(budget, notes)
