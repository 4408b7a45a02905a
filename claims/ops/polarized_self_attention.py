"""Polarized self-attention's claim: in residual blocks it makes pixel-wise outputs better than width or SE does.

Exact: gains in (0, 1), cost linear in the map, the official code's spatial gain against the paper's. Trained: CamVid
with a small residual net and a linear segmentation head, whose blocks have nothing (and more width instead), squeeze
and excitation, or the operator, parallel and sequential. The same nets also learn heat maps of the cells of BCCD, as
poses are learned: Gaussians around the centres, and the mean square error.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.backbones.resnet import BasicBlock, ResNet
from opsin.data import Boxes
from opsin.measure.cost import count_macs, count_params
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.quality import MeanIoU
from opsin.ops.attention.polarized_self_attention import PolarizedSelfAttention, insert_psa
from opsin.tasks.centernet import peaks
from opsin.tasks.segment import LinearSegmenter

SIZE, BATCH, CLASSES = (120, 160), 8, 11
WIDTHS, WIDER = (24, 48, 96), (25, 51, 103)
# The spread is the one, of 2, 3 and 4, at which wider base and parallel net both hit most in trials with seed 0.
SPREAD, TOLERANCE = 4.0, 0.2  # of a centre's Gaussian, in pixels; of a hit, as a share of the cell's larger side
Samples = tuple[Tensor, Tensor]
Loss = Callable[[LinearSegmenter, Tensor, Tensor], Tensor]


class SqueezeExcite(nn.Module):
    """A gain per channel from the mean pixel (Hu et al. 2018), with a bottleneck of `ratio`."""

    def __init__(self, dim: int, ratio: int = 4):
        super().__init__()
        self.fc = nn.Sequential(nn.Conv2d(dim, dim // ratio, 1), nn.ReLU(), nn.Conv2d(dim // ratio, dim, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


def insert_se(network: nn.Module) -> None:
    """Where `insert_psa` puts its operator; a ratio of 1 gives about as many parameters."""
    for block in network.modules():
        if isinstance(block, BasicBlock):
            block.relu1 = nn.Sequential(OrderedDict(act=block.relu1, se=SqueezeExcite(block.bn1.num_features, 1)))


def network(
    insert: Callable[[nn.Module], object], widths: tuple[int, ...], classes: int = CLASSES
) -> LinearSegmenter:  # fmt: skip
    trunk = ResNet(BasicBlock, (1, 1, 1), widths, num_classes=0)
    insert(trunk)
    return LinearSegmenter(trunk, classes, mean=(0.41, 0.42, 0.43), std=(0.3, 0.3, 0.3))


ARMS: dict[str, tuple[Callable[[nn.Module], object], tuple[int, ...]]] = {
    "wider base": (lambda net: None, WIDER),
    "SE": (insert_se, WIDTHS),
    "parallel": (partial(insert_psa, layout="parallel"), WIDTHS),
    "sequential": (partial(insert_psa, layout="sequential"), WIDTHS),
    "parallel, official softmax": (partial(insert_psa, layout="parallel", softmax="official"), WIDTHS),
}


def tensors(split: opsin.data.Split) -> Samples:
    images, labels = zip(*(split[i] for i in range(len(split))))
    return torch.stack(images), torch.stack(labels)


def cells(split: opsin.data.Split) -> tuple[Tensor, list[Boxes]]:
    """Images of BCCD at a quarter of their sides, and the boxes with them."""
    images, found = zip(*(split[i] for i in range(len(split))))
    small = F.interpolate(torch.stack(images), scale_factor=0.25, mode="area")
    return small, [Boxes(one.boxes / 4, one.labels) for one in found]


def heat_map(found: Boxes, classes: int) -> Tensor:
    """(classes, h, w): a Gaussian around the centre of every cell; where two meet, the larger one."""
    rows, columns = (torch.arange(side) + 0.5 for side in SIZE)
    x, y = ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).T[:, :, None, None]
    bumps = torch.exp(-((columns - x).square() + (rows[:, None] - y).square()) / (2 * SPREAD**2))
    where = found.labels[:, None, None].expand_as(bumps)
    return bumps.new_zeros(classes, *SIZE).scatter_reduce(0, where, bumps, "amax")


@torch.no_grad()
def hits(model: LinearSegmenter, images: Tensor, found: list[Boxes]) -> float:
    """Percent of cells near one of the n highest peaks of their class in their image, which has n of that class."""
    near = []
    for heat, truth in zip(torch.cat([model.logits(part) for part in images.split(16)]), found):
        tops = heat.masked_fill(~peaks(heat[None])[0], -torch.inf).flatten(1)
        for label in truth.labels.unique():
            boxes = truth.boxes[truth.labels == label]
            best = tops[label].topk(len(boxes)).indices
            at = torch.stack((best % SIZE[1], best // SIZE[1]), 1) + 0.5
            apart = torch.cdist((boxes[:, :2] + boxes[:, 2:]) / 2, at).amin(1)
            near.append(apart <= TOLERANCE * (boxes[:, 2:] - boxes[:, :2]).amax(1))
    return 100 * float(torch.cat(near).float().mean())


def segmentation_loss(model: LinearSegmenter, images: Tensor, labels: Tensor) -> Tensor:
    return model(images, labels)["loss"]


def heat_loss(model: LinearSegmenter, images: Tensor, heat: Tensor) -> Tensor:
    return F.mse_loss(model.logits(images), heat)


def trained(arm: str, seed: int, steps: int, train: Samples, classes: int, loss: Loss) -> LinearSegmenter:
    """AdamW with one cycle and flips; the batches depend on the seed alone."""
    torch.manual_seed(seed)
    model = network(*ARMS[arm], classes)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps, pct_start=0.1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(train[0]), (BATCH,), generator=order)
        images, labels = train[0][rows], train[1][rows]
        if torch.rand((), generator=order) < 0.5:
            images, labels = images.flip(-1), labels.flip(-1)
        optimiser.zero_grad(set_to_none=True)
        loss(model, images, labels).backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def miou(model: LinearSegmenter, samples: Samples) -> float:
    metric = MeanIoU(CLASSES)
    for images, labels in zip(samples[0].split(16), samples[1].split(16)):
        metric.update(model(images).labels, labels)
    return 100 * float(metric.compute())


@torch.no_grad()
def exact(experiment: Experiment) -> None:
    x = 3 * torch.randn(2, 32, 64, 64)
    spread = {}
    for layout in ("parallel", "sequential"):
        for softmax in ("paper", "official"):
            torch.manual_seed(0)
            op = PolarizedSelfAttention(32, layout, softmax)
            gains = torch.cat([op.channel_gain(x).flatten(), op.spatial_gain(x).flatten()])
            spread[f"{layout}, {softmax}"] = float((op.spatial_gain(x) - 0.5).abs().mean())
            outside = int(((gains <= 0) | (gains >= 1)).sum())
            experiment.check(f"gains outside (0, 1), {layout}, {softmax}", outside, "==", 0)
    experiment.record("mean distance of the spatial gain from 1/2 on 64x64 maps, fresh weights", spread)
    with torch.device("meta"):
        op = PolarizedSelfAttention(32)
        macs = [count_macs(op, torch.empty(1, 32, side, side)) for side in (16, 32, 64)]
    experiment.check("growth of the cost per quadrupled map", (macs[2] - macs[1]) / (macs[1] - macs[0]), "==", 4.0)


def regression(experiment: Experiment, seeds: range, steps: int) -> None:
    """Heat maps of cells' centres."""
    data = opsin.data.open("bccd")
    classes = len(data.classes)
    images, found = cells(data.splits["train"])
    train = images, torch.stack([heat_map(one, classes) for one in found])
    test = cells(data.splits["test"])
    rates = {arm: [hits(trained(arm, seed, steps, train, classes, heat_loss), *test) for seed in seeds]
             for arm in ("wider base", "SE", "parallel", "sequential")}  # fmt: skip
    experiment.record("hit cells in percent", rates)
    for layout in ("parallel", "sequential"):
        experiment.compare(f"hit cells, {layout} over the wider base (points)", rates[layout], rates["wider base"], 0.0)


def run(budget: ClaimBudget) -> Evidence:
    seeds, steps = range(budget.seeds), max(5, round(budget.seconds * 4 / 3))
    experiment = Experiment(
        "polarized_self_attention",
        "In residual blocks the operator gains at least 1.5 points of mean IoU over width, no less than SE, and both "
        "layouts agree within a point; its heat maps hit more cells.",
        data=f"CamVid at {SIZE[0]}x{SIZE[1]}, 11 classes, 367 train / 233 test; BCCD at that size, 205 train / 72 test",
        baseline="the same network, wider by as many parameters; squeeze and excitation of as many", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    sizes = {arm: count_params(network(*settings)) for arm, settings in ARMS.items()}
    experiment.record("parameters", sizes)
    experiment.check("parameters of the wider base over the parallel net's", sizes["wider base"] / sizes["parallel"],
                     ">=", 0.99)  # fmt: skip
    data = opsin.data.open("camvid", size=SIZE)
    train, test = (tensors(data.splits[name]) for name in ("train", "test"))
    scores = {arm: [miou(trained(arm, seed, steps, train, CLASSES, segmentation_loss), test) for seed in seeds]
              for arm in ARMS}  # fmt: skip
    experiment.record("mean IoU in percent", scores)
    for layout in ("parallel", "sequential"):
        experiment.compare(f"{layout} over the wider base (points)", scores[layout], scores["wider base"], 1.5)
    experiment.compare("parallel over SE (points)", scores["parallel"], scores["SE"], 0.0)
    apart = [abs(a - b) for a, b in zip(scores["parallel"], scores["sequential"], strict=True)]
    experiment.compare("1 less the distance of the layouts (points)", [1.0] * len(apart), apart, 0.0)
    regression(experiment, seeds, steps // 2)
    return experiment.evidence(
        budget,
        notes=f"A residual net of three blocks with widths {WIDTHS} (base: {WIDER}) and a linear head on its pyramid, "
        f"{steps} steps of {BATCH} images, half as many for heat maps; a fifth of the intended budget per run. The "
        "operator has the paper's softmax; the official code's was trained for the record.",
    )
