"""The scattering theory's claim: what it promises of distances, translations and deformations is what is measured.

On natural patches, for four frames, four non-linearities and three ways of pooling, made admissible: no pair of images
is driven apart; a translation moves deeper layers less; a deformation moves the features in proportion to it for smooth
images and as its root for cartoons. And the features are of use: a linear classifier on few digits reads them better
than pixels.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn import functional as F

import opsin
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.spectral.scattering_bounds import (
    admissibility,
    band_limited,
    deform,
    deformation_bound,
    expansion,
    norms,
    steepness,
    translation_bounds,
)
from opsin.ops.spectral.scattering_theory import NONLINEARITIES, FrameScattering

FRAMES = ("morlet", "weyl_heisenberg", "haar", "random")
POOLING = {"none": ("average", 1), "sub-sampling": ("subsample", 2), "average": ("average", 2)}
PAIRS, SIDE, LAYERS = 1000, 32, 3
SHIFT = 8  # pixels: the least that every one of three poolings by 2 commutes with
SAMPLES, PENALTIES = (20, 50, 100), (1e-3, 1e-2, 1e-1, 1.0)


def patches(count: int, side: int, seed: int = 0) -> Float[Tensor, "n 1 h w"]:
    """Grey patches of Berkeley photos, none of them plain."""
    photos, draw = opsin.data.open("bsds500").train, torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        photo = photos[i % 100]
        image = (photo[0] if isinstance(photo, tuple) else photo).mean(0)
        patch = torch.zeros(side, side)
        while patch.std() < 0.02:
            top, left = (int(torch.randint(n - side + 1, (), generator=draw)) for n in image.shape)
            patch = image[top : top + side, left : left + side]
        found.append(patch)
    return torch.stack(found)[:, None]


def networks(depth: int, **options: object) -> Iterator[tuple[str, FrameScattering]]:
    for frame, nonlinearity, (name, (pooling, factor)) in product(FRAMES, NONLINEARITIES, POOLING.items()):
        torch.manual_seed(0)
        net = FrameScattering(1, frame, nonlinearity, pooling, factor, depth, angles=3, filters=6, **options)
        yield f"{frame}, {nonlinearity}, {name}", net.eval()


@torch.no_grad()
def distances(experiment: Experiment) -> None:
    """Pairs of unlike patches, of a patch and a disturbed one, of a patch and a moved one; and norms alone."""
    f = patches(PAIRS, SIDE)
    draw = torch.Generator().manual_seed(1)
    near = f + 0.05 * torch.randn(f.shape, generator=draw)
    kinds = torch.arange(PAIRS)[:, None, None, None] % 3
    h = torch.where(kinds == 0, f.roll(1, 0), torch.where(kinds == 1, near, f.roll((1, 2), (2, 3))))
    worst, largest, constants = {}, 0.0, 0.0
    for name, net in networks(depth=2, scales=2):
        parts = [expansion(net, a, b) for a, b in zip(f.split(250), h.split(250))]
        worst[name] = float(torch.cat(parts).max())
        largest = max(largest, float(expansion(net, f[:250], torch.zeros_like(f[:250])).max()))
        constants = max(constants, *admissibility(net, SIDE, SIDE))
    experiment.record("greatest distance of features over that of images, by network", worst)
    experiment.check("admissibility: the greatest max(B, B L^2 R^2), less 1", constants - 1, "<=", 1e-12)
    experiment.check("greatest distance of features over that of images, all networks", max(worst.values()), "<=", 1.0)
    experiment.check("greatest norm of features over that of images, all networks", largest, "<=", 1.0)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@torch.no_grad()
def translations(experiment: Experiment) -> None:
    """The change of every layer over the image's norm, as in the theorem, and over the layer's own norm."""
    f = patches(64, 64).double()
    f = f - f.mean((2, 3), keepdim=True)  # a mean is invariant by itself
    moved, factors = f.roll(SHIFT, 3), [2**n for n in range(LAYERS + 1)]
    slopes, own, excess, changes = {}, {}, 0.0, {}
    for frame in FRAMES:
        torch.manual_seed(0)
        net = FrameScattering(1, frame, depth=LAYERS, angles=3, filters=4).double()
        before = net.features(f)
        change = norms([a - b for a, b in zip(net.features(moved), before, strict=True)])
        relative = (change / f.flatten(1).norm(dim=1)).mean(1).tolist()
        bounds = translation_bounds(net, 64, 64, SHIFT)
        excess = max(excess, float(((change / f.flatten(1).norm(dim=1)) / torch.tensor(bounds)[:, None]).max()))
        changes[frame], slopes[frame] = relative, slope(factors, relative)
        own[frame] = slope(factors, (change / norms(before)).mean(1).tolist())
    experiment.record("change over the image's norm, by layer", changes)
    experiment.record("its slope over S_1 .. S_n", slopes)
    experiment.record("slope of the change over the layer's own norm", own)
    experiment.check("change over its bound (worst image, layer and frame)", excess, "<=", 1.0)
    experiment.check("slope of the change over S_1 .. S_n (worst frame)", max(slopes.values()), "<=", -0.9)
    experiment.check("slope of the change over the layer's own norm (worst frame)", max(own.values()), "<", 0.0)


def field(side: int) -> Float[Tensor, "2 h w"]:
    """A smooth displacement of at most one pixel."""
    y, x = torch.meshgrid(*[2 * torch.pi * torch.arange(side, dtype=torch.float64) / side] * 2, indexing="ij")
    tau = torch.stack((torch.sin(x + 0.3), torch.cos(y)))
    return tau / tau.square().sum(0).max().sqrt()


def cartoon(tau: Float[Tensor, "2 h w"]) -> Float[Tensor, "1 1 h w"]:
    """A cut disc, white on black, at displaced positions; 4 x 4 points per pixel."""
    side = tau.shape[-1]
    y, x = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    inner = (torch.arange(4, dtype=torch.float64) + 0.5) / 4 - 0.5
    rows, columns = (y - tau[0])[..., None, None] + inner[:, None], (x - tau[1])[..., None, None] + inner
    disc = (rows - 0.49 * side) ** 2 + (columns - 0.51 * side) ** 2 < (0.28 * side) ** 2
    return (disc & (rows + columns / 2 > 0.62 * side)).double().mean((-2, -1))[None, None]


@torch.no_grad()
def changed(net: FrameScattering, f: Tensor, g: Tensor) -> float:
    apart = norms([a - b for a, b in zip(net.features(f), net.features(g), strict=True)]).norm(dim=0)
    return float((apart / f.flatten(1).norm(dim=1)).mean())


def deformations(experiment: Experiment) -> None:
    smooth, small, large = band_limited(patches(16, 64).double(), 0.1), (0.1, 0.2, 0.4, 0.8, 1.6), (8, 10, 13, 16, 20)
    linear, root, excess = {}, {}, 0.0
    shape, edges = field(64), field(512)
    shapes = {size: cartoon(size * edges) for size in (0, *large)}
    for frame in ("morlet", "haar"):
        net = FrameScattering(1, frame, scales=1).double()
        moves = [changed(net, smooth, deform(smooth, size * shape)) for size in small]
        excess = max(excess, *(m / deformation_bound(s * shape, 0.1) for m, s in zip(moves, small)))
        linear[frame] = slope(small, moves)
        root[frame] = slope(large, [changed(net, shapes[0], shapes[size]) for size in large])
    turn = 0.02 * field(64)[0]
    still, net = torch.zeros_like(shape), FrameScattering(1, frame="haar", nonlinearity="relu").double()
    phase = norms(net.features(deform(smooth, still, turn).real - smooth)).norm(dim=0) / smooth.flatten(1).norm(dim=1)
    excess = max(excess, float(phase.max().detach()) / deformation_bound(still, 0.1, turn))
    experiment.record("steepest displacement per pixel", max(steepness(1.6 * shape), steepness(20 * edges)))
    experiment.record("slope over sup|tau|, smooth images", linear)
    experiment.record("slope over sup|tau|, cartoons", root)
    experiment.check("change under deformation over its bound (worst)", excess, "<=", 1.0)
    for frame in linear:
        experiment.check(f"smooth images, {frame}: slope less 1, absolute", abs(linear[frame] - 1), "<=", 0.1)
        experiment.check(f"cartoons, {frame}: slope less 1/2, absolute", abs(root[frame] - 0.5), "<=", 0.15)


def grid_constant(experiment: Experiment) -> None:
    """On a grid the R of sub-sampling is S: with the plane's R = 1 a single bright pixel is driven from 0."""
    torch.manual_seed(0)
    net = FrameScattering(1, "random", pooling="subsample", depth=1, kernel_size=1, filters=1)
    net.layers[0].frame.kernels.fill_(1.0)
    net.layers[1].frame.kernels.copy_(torch.tensor([0.0, 1.0])[:, None, None])
    pixel = F.pad(torch.ones(1, 1, 1, 1), (0, 7, 0, 7))
    safe = float(expansion(net, pixel, torch.zeros_like(pixel)))
    net.layers[0].pooling = net.layers[0].pooling._replace(constant=lambda s: 1.0)
    experiment.check("a single pixel with R of sub-sampling on the grid", safe, "<=", 1.0)
    unsafe = float(expansion(net, pixel, torch.zeros_like(pixel)))
    experiment.check("the same with R of sub-sampling on the plane", unsafe, ">", 1.0)


def scores(inputs: np.ndarray, targets: np.ndarray, count: int, seeds: range, c: float) -> list[float]:
    """Accuracy of a linear support vector machine on `count` random digits, on those after the 500th of each order."""
    found = []
    for seed in seeds:
        order = np.random.default_rng(seed).permutation(len(inputs))
        model = make_pipeline(StandardScaler(), LinearSVC(C=c, dual="auto", max_iter=5000, random_state=0))
        model.fit(inputs[order[:count]], targets[order[:count]])
        found.append(100 * model.score(inputs[order[500:]], targets[order[500:]]))
    return found


@torch.no_grad()
def digits(experiment: Experiment, seeds: range) -> None:
    data = load_digits()
    images = F.pad(torch.tensor(data.images).float()[:, None] / 16, (2, 2, 2, 2))
    features = FrameScattering(1, "morlet", factor=(1, 2))(images).flatten(1).numpy()
    for count in SAMPLES:
        best = [
            max((scores(inputs, data.target, count, seeds, c) for c in PENALTIES), key=sum)
            for inputs in (features, data.data)
        ]
        experiment.compare(f"{count} digits: accuracy in points", *best, 3.0)


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(10, budget.seeds))
    experiment = Experiment(
        "scattering_theory",
        "Scattering with any admissible frames, non-linearities and pooling does not expand distances, grows more "
        "invariant to translation with depth, is stable to deformation, and reads few digits better than pixels.",
        data=f"Berkeley photos: {PAIRS} pairs of {SIDE}x{SIDE} and 64 patches of 64x64; a drawn disc; 8x8 digits",
        baseline="linear classifier on pixels", seeds=seeds,
    )  # fmt: skip
    grid_constant(experiment)
    distances(experiment)
    translations(experiment)
    deformations(experiment)
    digits(experiment, seeds)
    notes = (
        "the translation theorem bounds the change over the norm of the image, in which the fading of energy with "
        "depth takes part; the change over the layer's own norm is recorded beside it; cartoons are displaced by 8 "
        "to 20 pixels, since below the width of the output atom every pixel image is smooth; linear support vector "
        f"machines on standardised features, each side with its best C of {PENALTIES}; ten choices of the training "
        "digits"
    )
    return experiment.evidence(budget, notes)
