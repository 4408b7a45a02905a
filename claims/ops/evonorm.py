"""EvoNorm's claim: the layers found by evolution train at least as well as norm and activation, and so would new ones.

Exact: B0 and S0 as graphs of the search space are the layers; S0 without v is x / 2 over its group's deviation; B0 at
inference uses the running variance. Trained: a pre-activation ResNet-14 on CIFAR-10 with BN-ReLU, B0, GN-ReLU and S0 at
batch 64; and BN, B0 and S0 with the same number of images in batches of 4, which are more steps: what S0 keeps there
counts only where BN-ReLU loses. Searched: a small evolution on digits, whose best layer is trained again from other
seeds beside the random layers that passed the tests.
"""

import math
import statistics
from functools import partial

import torch
from torch import Tensor, nn

import opsin
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.normact.evonorm import EvoNormB0, EvoNormS0, evonorm, fitting_groups
from opsin.ops.normact.evonorm_graph import B0, S0, Graph, GraphNorm
from opsin.ops.normact.evonorm_search import ANCHORS, Judge, NormAct, Residual, Search, anchor
from opsin.train.bare import accuracy, tensors, train

WIDTH, BATCH, SMALL_BATCH = 16, 64, 4
STEPS, SMALL_IMAGES = 200, 4800
POPULATION, INITIAL, BRED = 30, 5, 110


def bn_relu(dim: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(dim), nn.ReLU())


def gn_relu(dim: int) -> nn.Module:
    return nn.Sequential(nn.GroupNorm(fitting_groups(dim), dim), nn.ReLU())


LAYERS: dict[str, NormAct] = {
    "BN-ReLU": bn_relu, "B0": partial(evonorm, form="b0"), "GN-ReLU": gn_relu, "S0": partial(evonorm, form="s0"),
}  # fmt: skip


def network(norm_act: NormAct) -> nn.Module:
    """Two pre-activation blocks at each of 16, 8 and 4 pixels, 14 layers with weights; 32 pixels come in."""
    layers: list[nn.Module] = []
    dim_in = 3
    for dim in (WIDTH, 2 * WIDTH, 4 * WIDTH):
        layers += [nn.Conv2d(dim_in, dim, 3, 2, 1, bias=False), Residual(dim, norm_act), Residual(dim, norm_act)]
        dim_in = dim
    head = (norm_act(dim_in), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim_in, 10))
    return nn.Sequential(*layers, *head)


@torch.no_grad()
def exact(experiment: Experiment) -> None:
    x = 1 + 2 * torch.randn(4, 16, 7, 5)
    worst = 0.0
    for graph, layer in ((B0, EvoNormB0(16)), (S0, EvoNormS0(16))):
        norm = GraphNorm(graph, 16, eps=layer.eps)
        norm.v1.copy_(torch.randn(16))
        layer.v.copy_(norm.v1)
        for mode in (True, False):
            worst = max(worst, float((norm.train(mode)(x) - layer.train(mode)(x)).abs().max()))
    experiment.check("B0 and S0 as graphs against the layers, train and eval (max error)", worst, "<", 1e-5)
    layer = EvoNormS0(16)
    layer.v.zero_()
    grouped = x.view(4, layer.groups, -1)
    half = 0.5 * grouped / (grouped.var(2, correction=0, keepdim=True) + layer.eps).sqrt()
    experiment.check("S0 with v = 0 (max error)", (layer(x) - half.view_as(x)).abs().max(), "<", 1e-5)
    layer = EvoNormB0(16).eval()
    layer.running_var.fill_(1e6)
    expected = x / (1e6 + layer.eps) ** 0.5
    experiment.check(
        "B0 in eval with a large running variance (max error)", (layer(x) - expected).abs().max(), "<", 1e-6
    )


def small_batches(experiment: Experiment, losses: dict[str, list[float]]) -> None:
    """The criteria at batch 4, from the points that each layer loses there with as many images, one per seed.

    They stay undecided unless BN-ReLU loses by more than its standard error: the small batch has many times the steps.
    """
    bn, s0, before = losses["BN-ReLU"], losses["S0"], len(experiment.criteria)
    experiment.compare("S0: less than 2 points lost at batch 4", [2.0] * len(s0), s0, 0.0)
    for name in ("BN-ReLU", "B0"):
        experiment.compare(f"{name}: points lost at batch 4 above S0's", losses[name], s0, 1.0)
    error = statistics.stdev(bn) / math.sqrt(len(bn)) if len(bn) > 1 else math.inf
    if statistics.fmean(bn) <= error:
        for criterion in experiment.criteria[before:]:
            criterion.held = None
            criterion.note = "does not count: BN-ReLU does not lose at batch 4"


def gained(losses: dict[str, list[float]]) -> str:
    """A sentence about what the small batches' steps gave."""
    gains = ", ".join(f"{-statistics.fmean(lost):+.1f} ({name})" for name, lost in losses.items())
    return (
        f"Equal images are {SMALL_IMAGES // BATCH} steps at batch {BATCH} against {SMALL_IMAGES // SMALL_BATCH} at "
        f"batch {SMALL_BATCH}, and accuracy there changed by {gains} points, plus being a gain: what S0 keeps counts "
        "only where BN-ReLU loses."
    )


def trained(experiment: Experiment, seeds: range) -> dict[str, list[float]]:
    """Returns the points that each layer loses at batch 4, one per seed."""
    data = opsin.data.open("cifar10")
    (x, y), (test_x, test_y) = tensors(data.train, 10_000), tensors(data.test, 2_000)
    x, test_x = (x - 0.47) / 0.25, (test_x - 0.47) / 0.25

    def score(name: str, seed: int, steps: int, batch: int, lr: float) -> float:
        torch.manual_seed(seed)
        net = train(network(LAYERS[name]), x, y, steps=steps, seed=seed, batch=batch, lr=lr)
        return accuracy(net, test_x, test_y)

    scores = {name: [score(name, seed, STEPS, BATCH, 4e-3) for seed in seeds] for name in LAYERS}
    experiment.record(f"accuracy in percent, batch {BATCH}, {STEPS} steps", scores)
    experiment.compare("B0 against BN-ReLU (points)", scores["B0"], scores["BN-ReLU"], -0.3)
    experiment.compare("S0 against GN-ReLU (points)", scores["S0"], scores["GN-ReLU"], 0.5)
    losses = {}
    for name in ("BN-ReLU", "B0", "S0"):
        runs = {
            b: [score(name, s, SMALL_IMAGES // b, b, 4e-3 * (b / BATCH) ** 0.5) for s in seeds]
            for b in (BATCH, SMALL_BATCH)
        }
        experiment.record(f"{name}: accuracy in percent by batch size, {SMALL_IMAGES} images", runs)
        losses[name] = [a - b for a, b in zip(runs[BATCH], runs[SMALL_BATCH], strict=True)]
    small_batches(experiment, losses)
    return losses


def digits() -> tuple[Tensor, Tensor]:
    data = opsin.data.open("digits")
    x, y = zip(*(tensors(data.splits[name], 2_000) for name in ("train", "val", "test")), strict=True)
    return 2 * torch.cat(x) - 1, torch.cat(y)


def proxy(x: Tensor, y: Tensor, held: slice, seed: int, model: nn.Module) -> float:
    """Accuracy on held-out digits after 100 steps on the first thousand."""
    train(model, x[:1000], y[:1000], steps=100, seed=seed, batch=32, lr=5e-3, augment=False)
    return accuracy(model, x[held], y[held])


def again(graph: Graph, fit: "partial[float]", seed: int) -> float:
    """Mean accuracy over the anchors from another seed."""
    scores = []
    for block in ANCHORS.values():
        torch.manual_seed(seed)
        scores.append(fit(anchor(block, partial(GraphNorm, graph), 1, 10, 8)))
    return statistics.fmean(scores)


def searched(experiment: Experiment, seeds: range) -> None:
    x, y = digits()
    judge = Judge(partial(proxy, x, y, slice(1000, 1400), 0), x[:32], y[:32], classes=10)
    search = Search(judge, population=POPULATION, initial=INITIAL, seed=0)
    while len(search.survivors(random_only=True)) < INITIAL:
        search.step()
    best = search.run(len(search.history) + BRED)
    assert best is not None
    random_ones = [r for r in search.history if r["random"] and r["scores"]]
    experiment.record("best layer found", str(best.graph))
    for kind in ("quality", "stability", ""):
        count = [sum(r["rejected"] == kind and r["random"] == drawn for r in search.history) for drawn in (True, False)]
        experiment.record(f"rejected by {kind}: random, bred" if kind else "survived: random, bred", count)
    experiment.record(
        "random graphs that do not read the input", sum(r["random"] and not r["scores"] for r in search.history)
    )
    share = sum(bool(r["rejected"]) for r in random_ones) / len(random_ones)
    experiment.check("share of random graphs that read the input and are rejected", share, ">", 0.5)
    valid = search.survivors(random_only=True)
    found, medians, ours = [], [], []
    for seed in seeds:
        fit = partial(proxy, x, y, slice(1400, None), 100 + seed)
        found.append(again(best.graph, fit, 100 + seed))
        medians.append(statistics.median(again(member.graph, fit, 100 + seed) for member in valid))
        ours.append(statistics.fmean(again(graph, fit, 100 + seed) for graph in (B0, S0)))
    experiment.record("B0 and S0 on the same anchors, mean accuracy", ours)
    experiment.compare("best found against the median random valid layer (points)", found, medians, 5.0)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "evonorm",
        "B0 is no worse than BN-ReLU and S0 better than GN-ReLU, S0 keeps its accuracy at batch 4, and a small search "
        "finds layers well above random valid ones.",
        data="CIFAR-10, 10,000 train / 2,000 test images; digits, 1,000 / 400 / 397",
        baseline="BN-ReLU, GN-ReLU; the median of the random layers that pass the tests", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    losses = trained(experiment, seeds)
    searched(experiment, seeds)
    notes = (
        f"AdamW with one cosine cycle, {STEPS} steps of batch {BATCH} ({STEPS * BATCH / 10_000:.1f} epochs) where the "
        f"plan was 8 epochs of SGD: what fits the time. The small batches see {SMALL_IMAGES} images, with the rate "
        f"scaled by the root of the batch. {gained(losses)} The search judges random graphs until {INITIAL} have "
        f"passed, and then {BRED} bred ones; graphs that do not read the input are left out of the share of "
        "rejections. The best layer is chosen on one part of the digits and compared on another, from new seeds."
    )
    return experiment.evidence(budget, notes)
