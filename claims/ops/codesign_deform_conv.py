"""The claim of co-designed deformable convolution: the square form keeps what deformation gives at a tenth of the cost.

Exact: whole scales are dilations, costs and windows are those of the formulas. Trained: blood cells in images of
192x256, a small CenterNet (four convolutions down to stride 32, three decoder layers back to stride 4), the same but
for the decoder's operator: plain depthwise, full deformable, and each step of the ladder. The nets of the square form
are then fine-tuned with 4-bit weights and 8-bit activations.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.data import Boxes, Split
from opsin.layers.fake_quant import fake_quantised
from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.quality import VocAP
from opsin.ops.conv.codesign_deform_conv import CodesignDeformConv, operator_macs, window_rows
from opsin.tasks.centernet import HEAT_BIAS, CentreDetector, Heads, plain_head
from opsin.tasks.detect import as_metric_rows

SIZE = (192, 256)
ENCODER, DECODER = (16, 32, 64, 96), (64, 48, 32)
STEPS, TUNING, BATCH, LR = 230, 50, 8, 4e-3
LADDER = ("plain", "full", "depthwise", "bounded", "square", "rounded")
Cells = tuple[Tensor, list[Boxes]]


class PlainDepthwise(nn.Sequential):
    """The decoder's operator without deformation."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False), nn.Conv2d(dim, out_dim, 1, bias=False)
        )


def operator(form: str, dim: int, out_dim: int) -> nn.Module:
    return PlainDepthwise(dim, out_dim) if form == "plain" else CodesignDeformConv(dim, form, out_dim=out_dim)


class SmallDetector(CentreDetector):
    """Stride 4 at once, three halvings, three decoder layers, three heads."""

    def __init__(self, form: str):
        super().__init__((0.5,) * 3, (0.25,) * 3)
        self.num_classes, self.stride, self.multiple = 3, 4, 32
        layers: list[nn.Module] = []
        dim = 3
        for width, stride in zip(ENCODER, (4, 2, 2, 2), strict=True):
            kernel = 7 if stride == 4 else 3
            conv = nn.Conv2d(dim, width, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            dim = width
        self.encoder = nn.Sequential(*layers)
        layers = []
        for width in DECODER:
            layers += [operator(form, dim, width), nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2)]
            dim = width
        self.decoder = nn.Sequential(*layers)
        self.heat, self.size, self.offset = (plain_head(dim, outputs) for outputs in (self.num_classes, 2, 2))
        nn.init.constant_(self.heat[-1].bias, HEAT_BIAS)

    def heads(self, images: Tensor) -> Heads:
        x = self.decoder(self.encoder(images))
        return Heads(self.heat(x), self.size(x), self.offset(x))


def small(split: Split) -> Cells:
    """The images at 192x256, and their boxes in its pixels."""
    images, boxes = [], []
    for image, target in (split[i] for i in range(len(split))):
        scale = torch.tensor([SIZE[1] / image.shape[2], SIZE[0] / image.shape[1]]).repeat(2)
        images.append(F.interpolate(image[None], SIZE, mode="bilinear", antialias=True)[0])
        boxes.append(Boxes(target.boxes * scale, target.labels))
    return torch.stack(images), boxes


def mirrored(image: Tensor, target: Boxes, across: bool, down: bool) -> tuple[Tensor, Boxes]:
    x0, y0, x1, y1 = target.boxes.unbind(1)
    if across:
        image, x0, x1 = image.flip(2), SIZE[1] - x1, SIZE[1] - x0
    if down:
        image, y0, y1 = image.flip(1), SIZE[0] - y1, SIZE[0] - y0
    return image, Boxes(torch.stack((x0, y0, x1, y1), 1), target.labels)


def train(model: nn.Module, cells: Cells, seed: int, steps: int, lr: float) -> None:
    """AdamW with one cycle; batches and flips depend on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.15)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(cells[1]), (BATCH,), generator=draw).tolist()
        flips = (torch.rand(BATCH, 2, generator=draw) < 0.5).tolist()
        batch = [mirrored(cells[0][r], cells[1][r], *f) for r, f in zip(rows, flips, strict=True)]
        losses = model(torch.stack([image for image, _ in batch]), [target for _, target in batch])
        optimiser.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()


@torch.no_grad()
def ap50(model: nn.Module, cells: Cells) -> float:
    metric = VocAP(3)
    model.eval()
    for first in range(0, len(cells[1]), 16):
        part = slice(first, first + 16)
        metric.update(*as_metric_rows(model(cells[0][part]), cells[1][part]))
    return 100 * float(metric.compute())


@torch.no_grad()
def dilation_errors() -> float:
    """The square form at s = 1, 2, 3 against depthwise convolutions of that dilation."""
    worst, x = 0.0, torch.randn(2, 16, 23, 30)
    for form in ("square", "rounded"):
        op = CodesignDeformConv(16, form)
        for s in (1, 2, 3):
            op.offsets.conv_scale.bias.fill_(s)
            expected = F.conv2d(x, op.conv.weight, padding=s, dilation=s, groups=16)
            worst = max(worst, float((op(x) - expected).abs().max()))
    return worst


def rows_read(form: str) -> int:
    """Input rows that the middle row of a 41-row map depends on, where offsets are as large as they get."""
    op, rows = CodesignDeformConv(1, form), []
    nn.init.ones_(op.conv.weight)
    for sign in (-1, 1):
        x = torch.rand(1, 1, 41, 41, requires_grad=True)
        predictor = op.offsets.conv_offset if form == "bounded" else op.offsets.conv_scale
        for value in (100.0, 3.5, 0.5):
            nn.init.constant_(predictor.bias, sign * value)
            rows += torch.autograd.grad(op(x)[0, 0, 20].sum(), x)[0].abs().sum((0, 1, 3)).nonzero().flatten().tolist()
    return max(rows) - min(rows) + 1


def decoder_macs(form: str) -> int:
    """Counted on one image: the decoder's operators, at strides 32, 16 and 8."""
    total, dim, (height, width) = 0, ENCODER[-1], (SIZE[0] // 32, SIZE[1] // 32)
    with torch.device("meta"):
        for i, out in enumerate(DECODER):
            total += count_macs(operator(form, dim, out), torch.empty(1, dim, height << i, width << i))
            dim = out
    return total


def exact(experiment: Experiment) -> None:
    experiment.check("s = 1, 2, 3 against dilated depthwise convolutions (max error)", dilation_errors(), "<", 1e-5)
    wrong = 0
    with torch.device("meta"):
        for form in ("full", "modulated", "depthwise", "bounded", "square", "rounded"):
            counted = count_macs(CodesignDeformConv(24, form, out_dim=40), torch.empty(1, 24, 11, 13))
            wrong += counted != operator_macs(form, 24, 40, 143)
    experiment.check("forms whose counted multiply-adds differ from the formula", wrong, "==", 0)
    experiment.check(
        "rows that the bounded form reads, 2 * 8 + 3", rows_read("bounded"), "==", window_rows("bounded", 41)
    )
    experiment.check("rows that the square form reads, 2 * 8 + 1", rows_read("square"), "==", window_rows("square", 41))
    macs = {form: decoder_macs(form) for form in LADDER}
    experiment.record("decoder multiply-adds", macs)
    experiment.check(
        "decoder multiply-adds of the square form over the full one's", macs["square"] / macs["full"], "<", 1 / 8
    )


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(3, budget.seeds))
    experiment = Experiment(
        "codesign_deform_conv",
        "A deformable convolution with one bounded number per position keeps at least 90 % of the full one's AP50 with "
        "less than an eighth of its decoder multiply-adds, and W4A8 costs it at most 5 points.",
        data=f"BCCD blood cells at {SIZE[0]}x{SIZE[1]}: 205 images to train on, 72 to test",
        baseline="the same detector with full deformable, and with plain depthwise convolutions", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    source = opsin.data.open("bccd")
    cells, unseen = small(source.splits["train"]), small(source.splits["test"])
    scores: dict[str, list[float]] = {form: [] for form in (*LADDER, "w4a8")}
    for seed in seeds:
        for form in LADDER:
            torch.manual_seed(seed)
            model: nn.Module = SmallDetector(form)
            train(model, cells, seed, STEPS, LR)
            scores[form].append(ap50(model, unseen))
            if form == "square":
                low = fake_quantised(model, 4, 8, momentum=0.9)
                train(low, cells, seed + 1000, TUNING, LR / 8)
                scores["w4a8"].append(ap50(low, unseen))
    experiment.record("AP50 per form", scores)
    kept = [0.9 * score for score in scores["full"]]
    experiment.compare("square: AP50 less 90 % of the full form's", scores["square"], kept, 0.0)
    experiment.compare("square: AP50 less the plain decoder's", scores["square"], scores["plain"], 0.0)
    experiment.compare("W4A8: AP50 less the float nets', at least -5", scores["w4a8"], scores["square"], -5.0)
    notes = (
        f"{STEPS} steps of AdamW (one cycle, {LR:g}) with batches of {BATCH} and flips, then {TUNING} steps in W4A8; "
        "the threshold against the plain decoder is 0 points. AP50 is Pascal VOC's, over three classes. The forms "
        "between full and square are no claim of their own; here the depthwise, bounded and rounded ones stay below "
        "the plain decoder"
    )
    return experiment.evidence(budget, notes)
