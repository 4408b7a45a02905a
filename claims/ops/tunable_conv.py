"""Tunable convolution's claim: one network with a slider is as good as networks trained for each setting.

Exact: the mixed kernel, the folded plain convolution and controls per sample all give the mixture of p convolutions.
Trained: DnCNN (8 layers, 32 channels) on grey photos with noise of sigma 25, asked for clean + t noise. One tunable
network with t drawn per sample, against a network per t, and against deep network interpolation (DNI) between the
network for t = 0 and its copy fine-tuned for t = 1; the same steps for every network.
"""

import copy
import math
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import opsin
from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.image_quality import luminance
from opsin.ops.conv.tunable_conv import TunableConv2d, controlled, make_tunable, set_control
from opsin.restore.interpolation import interpolate_networks
from opsin.restore.multi_loss import ParametricMultiLoss, per_sample
from opsin.restore.tunable_denoiser import Dncnn

SIGMA, DEPTH, WIDTH, PATCH, BATCH, STEPS, RATE = 25 / 255, 8, 32, 32, 8, 600, 2e-3
FINE_TUNE = 5e-5  # for DNI: at higher rates the two ends drift apart, and what lies between them is worse
POINTS = (0.0, 0.25, 0.5, 0.75, 1.0)
INTERIOR = POINTS[1:-1]
Loss = Callable[[Tensor, Tensor], Tensor]  # (noisy, clean) -> loss of a batch


def photos(split: str, count: int) -> list[Tensor]:
    """Grey photos (1, h, w) in [0, 1]."""
    source = opsin.data.open("bsds500").splits[split]
    return [luminance(source[i][0]) for i in range(count)]


def patches(images: list[Tensor], count: int, side: int, draw: torch.Generator) -> Tensor:
    """Random squares."""
    squares = []
    for i in torch.randint(len(images), (count,), generator=draw).tolist():
        y, x = (int(torch.randint(length - side + 1, (), generator=draw)) for length in images[i].shape[1:])
        squares.append(images[i][:, y : y + side, x : x + side])
    return torch.stack(squares)


def train(net: nn.Module, loss: Loss, images: list[Tensor], seed: int, rate: float = RATE) -> nn.Module:
    """Adam with one cycle; patches and noise depend on the seed alone."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        clean = patches(images, BATCH, PATCH, draw)
        noisy = clean + SIGMA * torch.randn(clean.shape, generator=draw)
        optimiser.zero_grad(set_to_none=True)
        loss(noisy, clean).backward()
        optimiser.step()
        schedule.step()
    return net.eval()


def fixed(net: nn.Module, t: float, images: list[Tensor], seed: int, rate: float = RATE) -> nn.Module:
    """A plain network for one t."""
    return train(net, lambda noisy, clean: F.mse_loss(net(noisy), torch.lerp(clean, noisy, t)), images, seed, rate)


def tunable(phi: str, images: list[Tensor], seed: int) -> nn.Module:
    """A tunable network for all t: w = (1 - t, t) mixes the kernels, and the distances from clean and from noisy."""
    torch.manual_seed(seed)
    net = make_tunable(Dncnn(DEPTH, WIDTH), controls=2, phi=phi)
    objectives = ParametricMultiLoss(
        [lambda out, clean, noisy: mse(out, clean), lambda out, clean, noisy: mse(out, noisy)], space="simplex"
    )
    order = torch.Generator().manual_seed(seed + 1000)
    return train(net, lambda noisy, clean: objectives.step(net, noisy, clean, noisy, generator=order), images, seed)


mse = per_sample(lambda a, b: F.mse_loss(a, b, reduction="none"))


@torch.no_grad()
def psnr(net: nn.Module, t: float, clean: Tensor, noisy: Tensor) -> float:
    """Decibels to clean + t noise, averaged over images."""
    error = mse(net(noisy), torch.lerp(clean, noisy, t))
    return float((-10 * error.log10()).mean())


def at(net: nn.Module, t: float) -> nn.Module:
    """A tunable network turned to t."""
    turned = copy.deepcopy(net)
    set_control(turned, [1 - t, t])
    return turned


@torch.no_grad()
def remaining_noise(net: nn.Module, clean: Tensor, noisy: Tensor) -> list[float]:
    """How much of the noise is left at t = 0, 0.1, ... 1, as the output's component along it."""
    noise = noisy - clean
    return [float(((at(net, t / 10)(noisy) - clean) * noise).sum() / noise.square().sum()) for t in range(11)]


@torch.no_grad()
def exact(experiment: Experiment) -> None:
    """The layer's identities, and what mixing kernels costs."""
    torch.manual_seed(0)
    layer, x, w = TunableConv2d(16, 24, 3, padding=1, controls=3), torch.randn(4, 16, 20, 20), torch.rand(4, 3)
    definition = layer.reference(x, w)
    experiment.check("a control per sample against the definition", (layer(x, w) - definition).abs().max(), "<", 1e-5)
    with controlled(layer, w[0]):
        error = (layer.fuse()(x) - layer.reference(x)).abs().max()
    experiment.check("folded plain convolution against the definition", error, "<", 1e-5)
    plain, image = Dncnn(DEPTH, WIDTH), torch.empty(1, 1, 128, 128)
    ratio = count_macs(make_tunable(plain), image) / count_macs(plain, image)
    experiment.check("multiply-adds over those of plain convolutions, 128x128", ratio, "<=", 1.001)


def scores(seed: int, images: list[Tensor], clean: Tensor, noisy: Tensor) -> tuple[dict[str, list[float]], nn.Module]:
    """PSNR at the five points of the three ways, and the tunable network."""
    slider = tunable("mlp", images, seed)
    separate = {}
    for t in POINTS[:-1]:
        torch.manual_seed(seed)
        separate[t] = fixed(Dncnn(DEPTH, WIDTH), t, images, seed)
    separate[1.0] = fixed(copy.deepcopy(separate[0.0]), 1.0, images, seed, FINE_TUNE)
    dni = {t: interpolate_networks(separate[0.0], separate[1.0], t) for t in POINTS}
    ways = {"tunable": {t: at(slider, t) for t in POINTS}, "separate": separate, "DNI": dni}
    return {name: [psnr(nets[t], t, clean, noisy) for t in POINTS] for name, nets in ways.items()}, slider


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(budget.seeds)
    experiment = Experiment(
        "tunable_conv",
        "One tunable denoiser is within 0.3 dB of networks trained for each setting, and 0.3 dB above DNI in between.",
        data="BSDS500, luminance, sigma 25: patches of 100 training photos, 32 squares of 96x96 from test photos",
        baseline="a network per setting; interpolation of two networks' weights (DNI); equal steps", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    images, draw = photos("train", 100), torch.Generator().manual_seed(7)
    clean = patches(photos("test", 40), 32, 96, draw)
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=draw)
    runs, rises = [], []
    for seed in seeds:
        figures, slider = scores(seed, images, clean, noisy)
        runs.append(figures)
        left = remaining_noise(slider, clean, noisy)
        rises.append(min(b - a for a, b in pairwise(left)))
        experiment.record(f"noise left at t = 0, 0.1, ... 1, seed {seed}", left)
    for name in ("tunable", "separate", "DNI"):
        experiment.record(f"PSNR at t = {POINTS}: {name}", [figures[name] for figures in runs])
    for phi in ("affine", "identity"):
        net = tunable(phi, images, 0)
        experiment.record(f"PSNR, phi {phi}, seed 0", [psnr(at(net, t), t, clean, noisy) for t in POINTS])
    means = {name: [statistics.fmean(r[name][1:4]) for r in runs] for name in ("tunable", "separate", "DNI")}
    low = {name: [statistics.fmean(r[name][:4]) for r in runs] for name in ("tunable", "separate")}
    experiment.check("least rise of the remaining noise per tenth of t", min(rises), ">", 0.0)
    experiment.compare("interior PSNR of tunable less DNI's", means["tunable"], means["DNI"], 0.3)
    experiment.compare("PSNR of tunable less the separate networks', t < 1", low["tunable"], low["separate"], -0.3)
    baseline = statistics.fmean(-20 * math.log10(SIGMA * (1 - t)) for t in INTERIOR)
    experiment.record("interior PSNR of the noisy input itself", baseline)
    notes = (
        f"DnCNN of {DEPTH} layers and {WIDTH} channels without batch norm; {STEPS} steps of Adam ({RATE}, one cycle), "
        f"{BATCH} patches of {PATCH}x{PATCH}. At t = 1 the answer is the input, which a network of its own reaches to "
        "any precision, so that PSNR there has no meaning: it is recorded, and compared only for t < 1. DNI's second "
        f"network is fine-tuned at {FINE_TUNE}; a first run at the full rate gave DNI 27.4 dB in between"
    )
    return experiment.evidence(budget, notes)
