"""DeepLab's claims: parallel rates beat one rate at no cost in parameters, and a CRF recovers the edges.

Exact: the three definitions of atrous convolution, its parameters, its receptive field. Trained, on CamVid: the same
small network whose pyramid has the rates 1, 2, 4, 6, all 1, or all at the best single rate. Then the fully connected
CRF, with its parameters chosen on 20 training images, on what the first of them predicts for test images.
"""

import statistics
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.backbones.resnet import BasicBlock, ResNet
from opsin.data import IGNORE
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.quality import MeanIoU
from opsin.tasks.crf import DenseCRF
from opsin.tasks.deeplab import AtrousConv, DeepLab

SIZE, BATCH, CLASSES, BAND = (120, 160), 8, 11, 2
RATES, SINGLE = (1, 2, 4, 6), (2, 4, 6)
CRF_GRID = tuple(product((2.0, 4.0), (15.0, 30.0), (5.0, 12.0)))  # w_a, s_a, s_b
CRF_TRAIN, CRF_TEST = 20, 40
Samples = tuple[Tensor, Tensor]


@torch.no_grad()
def operator_errors() -> tuple[float, float]:
    """The largest difference of the dilated convolution to the zero-stuffed kernel, and to the phase decomposition."""
    worst = [0.0, 0.0]
    for rate in (2, 3, 6):
        conv, x = AtrousConv(8, 8, rate), torch.randn(2, 8, 31, 40)
        stuffed = torch.zeros(8, 8, 2 * rate + 1, 2 * rate + 1)
        stuffed[:, :, ::rate, ::rate] = conv.weight
        y = conv(x)
        phases = torch.zeros_like(y)
        for i, j in product(range(rate), repeat=2):
            phases[:, :, i::rate, j::rate] = F.conv2d(x[:, :, i::rate, j::rate], conv.weight, conv.bias, padding=1)
        for i, other in enumerate((F.conv2d(x, stuffed, conv.bias, padding=rate), phases)):
            worst[i] = max(worst[i], float((y - other).abs().max()))
    return worst[0], worst[1]


def receptive_field(rate: int) -> int:
    """Width of what one output depends on, measured by its gradient."""
    x = torch.zeros(1, 1, 41, 41, requires_grad=True)
    conv = AtrousConv(1, 1, rate)
    torch.nn.init.ones_(conv.weight)
    conv(x)[0, 0, 20, 20].backward()
    assert x.grad is not None
    columns = x.grad[0, 0].any(0).nonzero()
    return int(columns.max() - columns.min()) + 1


def network(rates: tuple[int, ...]) -> DeepLab:
    """0.36 M parameters, output stride 8."""
    trunk = ResNet(BasicBlock, (1, 1, 1, 1), (16, 32, 64, 128), num_classes=0, output_stride=8)
    return DeepLab(trunk, CLASSES, rates=rates)


def trained(rates: tuple[int, ...], seed: int, steps: int, train: Samples) -> DeepLab:
    """AdamW with the poly schedule and flips, the same batches for every pyramid of a seed."""
    torch.manual_seed(seed)
    model = network(rates)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 - step / steps) ** 0.9)
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(train[0]), (BATCH,), generator=random)
        images, labels = train[0][rows], train[1][rows]
        if torch.rand((), generator=random) < 0.5:
            images, labels = images.flip(-1), labels.flip(-1)
        optimizer.zero_grad(set_to_none=True)
        model(images, labels)["loss"].backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def miou(model: DeepLab, samples: Samples) -> float:
    """Percent, over all pixels of the samples."""
    metric = MeanIoU(CLASSES)
    for images, labels in zip(samples[0].split(16), samples[1].split(16)):
        metric.update(model(images).labels, labels)
    return 100 * float(metric.compute())


def near_edges(labels: Tensor) -> Tensor:
    """The labels within `BAND` pixels of an edge between classes; all others ignored."""
    grey = labels[:, None].float()
    side = 2 * BAND + 1
    highest, lowest = (sign * F.max_pool2d(sign * grey, side, 1, BAND) for sign in (1, -1))
    return labels.where((highest != lowest)[:, 0], torch.full_like(labels, IGNORE))


@torch.no_grad()
def with_crf(model: DeepLab, crf: DenseCRF, samples: Samples) -> dict[str, float]:
    """mIoU in percent, everywhere and near edges."""
    metrics = {"everywhere": MeanIoU(CLASSES), "near edges": MeanIoU(CLASSES)}
    edges = near_edges(samples[1])
    for image, labels, band in zip(samples[0], samples[1], edges):
        found = crf(model.logits(image[None])[0], image).argmax(0)[None]
        metrics["everywhere"].update(found, labels[None])
        metrics["near edges"].update(found, band[None])
    return {name: 100 * float(metric.compute()) for name, metric in metrics.items()}


def every(samples: Samples, count: int) -> Samples:
    """`count` samples, evenly spread: neighbours in CamVid are frames of one drive."""
    rows = torch.linspace(0, len(samples[0]) - 1, count).long()
    return samples[0][rows], samples[1][rows]


def tensors(split: opsin.data.Split) -> Samples:
    images, labels = zip(*(split[i] for i in range(len(split))))
    return torch.stack(images), torch.stack(labels)


def exact(experiment: Experiment) -> None:
    stuffed, phases = operator_errors()
    experiment.check("dilated against zero-stuffed kernel (max error)", stuffed, "<", 1e-5)
    experiment.check("dilated against phases of the image (max error)", phases, "<", 1e-5)
    counts = {sum(p.numel() for p in AtrousConv(8, 8, rate).parameters()) for rate in (1, 2, 6, 24)}
    experiment.check("different parameter counts over rates", len(counts), "==", 1)
    wrong = [rate for rate in range(1, 9) if receptive_field(rate) != 3 + 2 * (rate - 1)]
    experiment.check("rates whose receptive field is not k + (k - 1)(r - 1)", len(wrong), "==", 0)


def run(budget: ClaimBudget) -> Evidence:
    seeds, steps = range(budget.seeds), max(5, round(budget.seconds * 5 / 3))
    experiment = Experiment(
        "deeplab",
        "Summing 3x3 branches of several rates beats the same branches at one rate, and a fully connected CRF makes "
        "the edges of a stride-8 segmentation better.",
        data=f"CamVid at {SIZE[0]}x{SIZE[1]}, 11 classes, 367 train / 101 val / 233 test",
        baseline="the same network with all rates 1, or all at the best single rate; no CRF", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    data = opsin.data.open("camvid", size=SIZE)
    train, val, test = (tensors(data.splits[name]) for name in ("train", "val", "test"))

    pyramids = {seed: trained(RATES, seed, steps, train) for seed in seeds}
    aspp = [miou(model, test) for model in pyramids.values()]
    ones = [miou(trained((1,) * 4, seed, steps, train), test) for seed in seeds]
    first = {rate: trained((rate,) * 4, seeds[0], steps, train) for rate in SINGLE}
    chosen = {rate: miou(model, val) for rate, model in first.items()}
    best = max(chosen, key=lambda rate: chosen[rate])
    single = [miou(first[best], test)] + [miou(trained((best,) * 4, s, steps, train), test) for s in seeds[1:]]
    experiment.record("validation mIoU of single rates, first seed", chosen)
    experiment.compare("rates 1, 2, 4, 6 against all 1 (mIoU points)", aspp, ones, 1.5)
    experiment.compare(f"rates 1, 2, 4, 6 against all {best} (mIoU points)", aspp, single, -0.2)

    tuning, held_out = every(train, CRF_TRAIN), every(test, CRF_TEST)
    scores = {p: with_crf(pyramids[seeds[0]], DenseCRF(*p, w_g=3.0, s_g=1.0), tuning)["near edges"] for p in CRF_GRID}
    parameters = max(scores, key=lambda p: scores[p])
    experiment.record("mIoU near edges on training images by (w_a, s_a, s_b)", scores)
    plain, sharp = ([with_crf(m, crf, held_out) for m in pyramids.values()] for crf in crfs(parameters))
    for place, margin in (("near edges", 1.5), ("everywhere", 0.0)):
        ours, without = ([row[place] for row in rows] for rows in (sharp, plain))
        experiment.compare(f"with against without CRF, {place} (mIoU points)", ours, without, margin)
    return experiment.evidence(
        budget,
        notes=f"Scaled from the 180x240 and 1 M parameters intended to 120x160, 0.36 M and {steps} steps of {BATCH}; "
        f"mean mIoU {statistics.fmean(aspp):.1f} %. Edges are +-{BAND} pixels (3 at 180x240). CRF with w_a, s_a, s_b = "
        f"{parameters}, w_g = 3, s_g = 1, on {CRF_TEST} test images.",
    )


def crfs(parameters: tuple[float, float, float]) -> Iterator[DenseCRF]:
    """Without iterations, which is the plain prediction, and with them."""
    yield DenseCRF(iterations=0)
    yield DenseCRF(*parameters, w_g=3.0, s_g=1.0)
