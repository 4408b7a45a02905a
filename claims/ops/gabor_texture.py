"""The Gabor texture branch's claim: beside a small CNN, statistics of learned Gabor responses help with textures.

Exact: kernels are scikit-image's for the same numbers, their numbers stay in range however long they are pushed, and
histograms sum to 1 and do not change when the map is shifted around. Trained: which photo does a grey patch come from,
with a four-layer CNN that has the texture branch, against a CNN widened to as many parameters; and the branch with
learned Gabor numbers, with the fixed grid that they start from, and with free 11x11 filters in their place.
"""

import numpy as np
import torch
from skimage.filters import gabor_kernel
from torch import Tensor, nn

import opsin
from opsin.backbones import Backbone, FeatureInfo
from opsin.measure.cost import count_params
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.image_quality import luminance
from opsin.ops.conv.gabor_texture import (
    ASPECT,
    BANDWIDTH,
    GaborFilters,
    gabor_kernels,
    histogram,
    parameter_groups,
    soft_levels,
    without_mean,
)
from opsin.tasks.classify import Classifier
from opsin.tasks.gabor_classifier import GaborClassifier

CLASSES, CELL, SIDE, FILTERS, TAPS = 20, 64, 24, 16, 11
STEPS, BATCH, RATE = 250, 24, 3e-3
BRANCHES = ("learned Gabor", "fixed Gabor grid", "free filters")


class SmallCnn(Backbone):
    """Four 3x3 convolutions, each at half the size of the one before, with batch norm and ReLU."""

    def __init__(self, width: int, num_classes: int = 0):
        super().__init__()
        dims = [width, 2 * width, 3 * width, 4 * width]
        self.num_classes, self.num_features = num_classes, dims[-1]
        self.feature_info = [FeatureInfo(dim, 2 ** (i + 1)) for i, dim in enumerate(dims)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in zip([1, *dims], dims)
        )
        self.norm = nn.LayerNorm(dims[-1]) if num_classes else nn.Identity()
        self.head = nn.Linear(dims[-1], num_classes) if num_classes else nn.Identity()

    def features(self, x: Tensor) -> list[Tensor]:
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x.mean((2, 3))))


class FreeFilters(nn.Module):
    """Unconstrained filters of zero mean and length 1: every tap is learned."""

    def __init__(self, count: int, side: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, side, side) / side)

    def forward(self) -> Tensor:
        return without_mean(self.weight)


def textures() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test patches with their photo's number: the 20 photos of BSDS500 train with the most fine detail.

    Photos are cut into cells of 64x64 and dealt out like the squares of a chessboard, so that no pixel is in both.
    """
    source = opsin.data.open("bsds500").splits["train"]
    photos = [luminance(source[i][0])[0] for i in range(len(source))]
    detail = [float((p[1:] - p[:-1]).abs().median() + (p[:, 1:] - p[:, :-1]).abs().median()) for p in photos]
    chosen = sorted(range(len(photos)), key=lambda i: -detail[i])[:CLASSES]
    sides: list[list[tuple[Tensor, int]]] = [[], []]
    for label, i in enumerate(chosen):
        rows, columns = (length // CELL for length in photos[i].shape)
        for y in range(rows):
            for x in range(columns):
                cell = photos[i][y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL]
                sides[(x + y) % 2].append((cell, label))
    (a, b), (c, d) = (zip(*side, strict=True) for side in sides)
    return torch.stack(a)[:, None], torch.tensor(b), torch.stack(c)[:, None], torch.tensor(d)


def varied(images: Tensor, draw: torch.Generator) -> Tensor:
    """Mirrored at random both ways, with brightness times 0.7 to 1.3 and shifted by up to 0.1."""
    n = len(images)
    for axis in (2, 3):
        mirror = torch.rand(n, 1, 1, 1, generator=draw) < 0.5
        images = torch.where(mirror, images.flip(axis), images)
    gain, shift = (torch.rand(n, 1, 1, 1, generator=draw) - 0.5 for _ in range(2))
    return images * (1 + 0.6 * gain) + 0.2 * shift


def build(branch: str) -> GaborClassifier:
    model = GaborClassifier(
        SmallCnn(16), CLASSES, 1, FILTERS, TAPS, scales=(0.5,), side=SIDE, budget=1 / 3, mean=(0.45,), std=(0.22,)
    )
    if branch == "fixed Gabor grid":
        model.network.texture.filters.requires_grad_(False)
    elif branch == "free filters":
        model.network.texture.filters = FreeFilters(FILTERS, TAPS)
    return model


def widened(parameters: int) -> Classifier:
    """The CNN of the width that comes nearest to this number of parameters."""
    width = min(range(8, 64), key=lambda w: abs(count_params(SmallCnn(w, CLASSES)) - parameters))
    return Classifier(SmallCnn(width, CLASSES), (0.45,), (0.22,))


def trained(model: Classifier, images: Tensor, labels: Tensor, seed: int) -> Classifier:
    """AdamW with one cycle; Gabor numbers at a tenth of the rate. Batches depend on the seed alone."""
    learned = any(isinstance(m, GaborFilters) and m.theta.requires_grad for m in model.modules())
    groups = parameter_groups(model, RATE) if learned else [{"params": list(model.parameters()), "lr": RATE}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.05)
    rates = [group["lr"] for group in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=STEPS, pct_start=0.1)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(images), (BATCH,), generator=draw)
        optimiser.zero_grad(set_to_none=True)
        losses = model(varied(images[rows], draw), labels[rows])
        torch.stack(list(losses.values())).sum().backward()
        optimiser.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    answers = torch.cat([model(x).labels for x in images.split(100)])
    return 100 * float((answers == labels).float().mean())


@torch.no_grad()
def share_kept(model: GaborClassifier, images: Tensor) -> float:
    return float(torch.cat([model(x).kept for x in images.split(100)]).mean())


def library_difference() -> float:
    """Largest difference from scikit-image's kernels, which are over 2 pi sigma_x sigma_y."""
    worst = 0.0
    cases = ((0.3, 4.0, 1.6, 0.5, 0.0), (2.2, 7.5, 2.4, 0.8, 1.1), (1.2, 3.0, 2.0, 1.0, -2.0))
    for theta, wavelength, sigma, gamma, psi in cases:
        given = [torch.tensor([v], dtype=torch.float64) for v in (sigma, theta, wavelength, psi, gamma)]
        theirs = gabor_kernel(1 / wavelength, theta, sigma_x=sigma, sigma_y=sigma / gamma, n_stds=3, offset=psi)
        theirs = np.real(theirs) * 2 * np.pi * sigma * sigma / gamma
        rows, columns = theirs.shape
        side = max(rows, columns)
        ours = gabor_kernels(*given, side)[0].numpy()
        top, left = (side - rows) // 2, (side - columns) // 2
        worst = max(worst, float(np.abs(ours[top : top + rows, left : left + columns] - theirs).max()))
    return worst


def outside_after_pushing() -> int:
    """Filters with a number out of range after steps of a large rate along random directions."""
    filters = GaborFilters(32, TAPS)
    optimiser = torch.optim.SGD(filters.parameters(), 100.0)
    for _ in range(50):
        optimiser.zero_grad()
        (filters() * torch.randn(32, TAPS, TAPS)).sum().backward()
        optimiser.step()
    v = {name: value.detach() for name, value in filters.values().items()}
    ranges = {
        "theta": (0, torch.pi), "psi": (-torch.pi, torch.pi), "wavelength": (2, TAPS), "bandwidth": BANDWIDTH,
        "gamma": ASPECT,
    }  # fmt: skip
    bad = [(v[name] < low - 1e-5) | (v[name] > high + 1e-5) for name, (low, high) in ranges.items()]
    return int(torch.stack([*bad, ~v["sigma"].isfinite()]).any(0).sum())


def exact(experiment: Experiment) -> None:
    torch.manual_seed(0)
    experiment.check("kernels against scikit-image's (max difference)", library_difference(), "<", 1e-6)
    experiment.check("filters with a number out of range after large steps", outside_after_pushing(), "==", 0)
    maps = torch.randn(4, 8, 20, 22)
    shares = histogram(soft_levels(maps)[0])
    experiment.check("sum of a histogram less 1", (shares.sum(2) - 1).abs().max(), "<", 1e-5)
    moved = histogram(soft_levels(maps.roll((5, 9), (2, 3)))[0])
    experiment.check("change of a histogram when the map is shifted around", (moved - shares).abs().max(), "<", 1e-5)
    leak = float(GaborFilters(16)().sum((1, 2)).abs().max().detach())
    experiment.check("response of a kernel to plain brightness", leak, "<", 1e-5)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(5, budget.seeds))
    experiment = Experiment(
        "gabor_texture",
        "A texture branch of learned Gabor filters beside a small CNN is 3 points better than a wider CNN; learned "
        "numbers are at least as good as the fixed grid, and that as free filters.",
        data="20 photos of BSDS500 with the most fine detail, grey cells of 64x64, alternately to train and to test",
        baseline="the CNN alone, widened to the same number of parameters", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    images, labels, test_images, test_labels = textures()
    test_images = varied(test_images, torch.Generator().manual_seed(99))
    scores: dict[str, list[float]] = {name: [] for name in (*BRANCHES, "wider CNN")}
    kept, parameters = [], count_params(build("learned Gabor"))
    for seed in seeds:
        for name, figures in scores.items():
            torch.manual_seed(seed)
            model = widened(parameters) if name == "wider CNN" else build(name)
            trained(model, images, labels, seed)
            figures.append(accuracy(model, test_images, test_labels))
            if name == "learned Gabor":
                kept.append(share_kept(model, test_images))
    sizes = {name: count_params(build(name)) for name in BRANCHES} | {"wider CNN": count_params(widened(parameters))}
    experiment.record("parameters", sizes)
    experiment.record("accuracy", scores)
    experiment.record("share of the regions that the gate keeps", kept)
    learned, fixed, free, wider = (scores[name] for name in (*BRANCHES, "wider CNN"))
    experiment.compare("accuracy of CNN and learned Gabor branch less the wider CNN's (points)", learned, wider, 3.0)
    experiment.compare("learned Gabor numbers less the fixed grid (points)", learned, fixed, 0.0)
    experiment.compare("fixed Gabor grid less free filters (points)", fixed, free, 0.0)
    notes = (
        f"{len(images)} training and {len(test_images)} test patches; {STEPS} steps of AdamW ({RATE}, one cycle; Gabor "
        f"numbers a tenth), batches of {BATCH}, mirrored and of varied brightness; {FILTERS} filters of {TAPS}x{TAPS}, "
        f"nine boxes of half the side, zoomed to {SIDE}x{SIDE}, a third of them to be kept; at least five seeds"
    )
    return experiment.evidence(budget, notes)
