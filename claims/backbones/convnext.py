"""ConvNeXt's claim: a ResNet modernised step by step ends well above where it began, at equal cost.

Exact: the five networks have timm's parameters and multiplications to the last unit, and every rung of the ladder has
those of the paper's table 10. Trained: the ladder at small scale on CIFAR-10, nine rungs above the ResNet, each with
the same recipe; the widening is the one that brings the last rung to the ResNet's cost, as in the paper.
"""

from itertools import pairwise

import torch
from torch import nn

import opsin
from opsin.catalog import card_of
from opsin.measure.cost import count_macs, measure
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.train.bare import accuracy, tensors, train

COUNTS = {  # parameters and multiply-accumulates of timm 1.0.31's models at 224 pixels, by the same counter
    "convnext_tiny": (28_589_128, 4_455_531_264),
    "convnext_small": (50_223_688, 8_683_712_256),
    "convnext_base": (88_591_464, 15_354_729_472),
    "convnext_large": (197_767_336, 34_361_433_600),
    "convnext_xlarge": (350_196_968, 60_921_030_656),
}
RUNGS = (  # the paper's steps, those that change little or only together taken as one
    "resnet", "stage_ratio", "patchify", "width", "inverted", "moved_up", "gelu", "fewer_norms", "layer_norm",
    "separate_downsampling",
)  # fmt: skip
WIDTH, WIDENED = 16, 27
BATCH = 64
STEPS_PER_SECOND = 38  # of one network, on one core; sets how the budget is divided


def network(step: str) -> nn.Module:
    """A rung for 32-pixel images: maps of 8, 4 and 2 pixels; blocks in the ratio 1:2:2, and 1:1:3 after its change."""
    width = WIDTH if RUNGS.index(step) < RUNGS.index("width") else WIDENED
    depths = (1, 2, 2) if step == "resnet" else (1, 1, 3)
    return opsin.create("convnext_ladder", step=step, width=width, depths=depths, num_classes=10)


def sizes(experiment: Experiment) -> None:
    """The exact part."""
    worst = 0
    for name, (params, macs) in COUNTS.items():
        cost = measure(name, 224, modes=())
        experiment.record(f"{name}: parameters, multiplications", [cost.params, cost.macs])
        worst = max(worst, abs(cost.params - params), abs(cost.macs - macs))
    experiment.check("counts of the five networks less timm's (max)", worst, "==", 0)
    ladder = {
        name: (measure(name, 224, modes=()).macs / 1e9, v) for name, v in card_of("convnext_ladder").variants.items()
    }
    experiment.record("G multiplications of the rungs", {name: macs for name, (macs, _) in ladder.items()})
    off = max(abs(macs - v.macs_g) / v.macs_g for macs, v in ladder.values())
    experiment.check("rungs' multiplications, relative to table 10 (max difference)", off, "<", 0.01)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "convnext",
        "Modernising a ResNet step by step gains at least 2 points at equal cost, and hardly any step hurts.",
        data="CIFAR-10, 10,000 train / 2,000 test images", baseline="the ResNet rung, same recipe", seeds=seeds,
    )  # fmt: skip
    sizes(experiment)
    image = torch.zeros(1, 3, 32, 32)
    macs = {step: count_macs(network(step), image) for step in RUNGS}
    experiment.record("small rungs' M multiplications", {step: value / 1e6 for step, value in macs.items()})
    experiment.check("last rung's cost over the ResNet's, less 1", abs(macs[RUNGS[-1]] / macs["resnet"] - 1), "<=", 0.1)

    data = opsin.data.open("cifar10")
    (x, y), (test_x, test_y) = tensors(data.train, 10_000), tensors(data.test, 2_000)
    x, test_x = (x - 0.47) / 0.25, (test_x - 0.47) / 0.25
    steps = max(20, int(budget.seconds * STEPS_PER_SECOND / (len(RUNGS) * budget.seeds)))
    scores: dict[str, list[float]] = {step: [] for step in RUNGS}
    for seed in seeds:
        for step in RUNGS:
            torch.manual_seed(seed)
            model = train(network(step), x, y, steps=steps, seed=seed, batch=BATCH)
            scores[step].append(accuracy(model, test_x, test_y))
    experiment.record("accuracy in percent", scores)
    experiment.compare("last rung against the ResNet (points)", scores[RUNGS[-1]], scores["resnet"], 2.0)
    means = [sum(scores[step]) / len(seeds) for step in RUNGS]
    good = sum(after >= before - 0.5 for before, after in pairwise(means))
    experiment.check("rungs of nine that lose at most half a point", good, ">=", 6)
    return experiment.evidence(
        budget,
        notes=f"{steps} steps of batch {BATCH} ({steps * BATCH / len(x):.1f} epochs) where the plan was 15: "
        "what fits the budget. Depthwise and wider, kernel 7 and GELU, fewer activations and norms are one rung each. "
        "The paper prints 4.46 G for the step to layer norm, which the card corrects to 4.15.",
    )
