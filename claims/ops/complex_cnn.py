"""The claim on complex networks: where the phase carries the answer they beat real ones of the same size.

Exact: complex convolution is PyTorch's on complex tensors, batch normalisation leaves the identity as covariance, and a
layer without offset commutes with a turn of the phase. Trained: patches of photographs, low-passed in the Fourier
domain, times a phase that rises across the patch, wavers, and starts anywhere, in noise; which of eight directions does
it rise in? CNN and CNNx2 see real and imaginary parts as two channels. The control has no phase at all: CIFAR-10 with
imaginary part zero.
"""

import math

import torch
from torch import Tensor, nn

import opsin
from opsin.layers.complex import ComplexBatchNorm, comparison_triple, real_parameters
from opsin.layers.complex.norm import statistics
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.conv.complex_cnn import ComplexConv
from opsin.train.bare import accuracy, train

SIDE, TRAIN, TEST, STEPS = 16, 3000, 1000, 300
REAL_SIDE, REAL_TRAIN, REAL_TEST, REAL_STEPS = 16, 6000, 1500, 400
WIDTH, NAMES = 14, ("CNN", "CNNx2", "complex CNN")


def network(width: int, channels: int, classes: int) -> nn.Sequential:
    """Four convolutions with batch norm and ReLU, 16x16 to 4x4, mean, and a linear layer."""
    layers: list[nn.Module] = []
    for dim_in, dim, stride in (
        (channels, width, 1),
        (width, width, 2),
        (width, 2 * width, 1),
        (2 * width, 2 * width, 2),
    ):
        layers += [nn.Conv2d(dim_in, dim, 3, stride, 1, bias=False), nn.BatchNorm2d(dim), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, classes))


def low_pass(x: Tensor, share: float) -> Tensor:
    """Keeps the frequencies below a share of the Nyquist frequency."""
    rows, columns = (torch.fft.fftfreq(side) for side in x.shape[-2:])
    kept = (rows[:, None].square() + columns.square()).sqrt() < share / 2
    return torch.fft.ifft2(torch.fft.fft2(x) * kept)


def photographs() -> dict[str, Tensor]:
    """Grey photographs of BSDS500 at half size, by split."""
    data, grey = opsin.data.open("bsds500"), torch.tensor([0.299, 0.587, 0.114])
    found = {}
    for name in ("train", "test"):
        split = data.splits[name]
        images = [split[i][0][:3, :320, :320] for i in range(60)]
        found[name] = torch.stack([torch.einsum("chw,c->hw", crop(image), grey) for image in images])
    return found


def crop(image: Tensor) -> Tensor:
    """The middle 320x320, at half size."""
    top, left = ((side - 320) // 2 for side in image.shape[1:])
    return nn.functional.avg_pool2d(image[:, top : top + 320, left : left + 320], 2)


def waves(photos: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Patches times a rising phase, in noise: (count, 2, side, side), and the direction of the rise in eighths."""
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(len(photos), (count,), generator=draw)
    rows, columns = (torch.randint(photos.shape[1] - SIDE, (count, 1), generator=draw) for _ in range(2))
    places = torch.arange(SIDE)
    patches = photos[which[:, None, None], (rows + places)[:, :, None], (columns + places)[:, None]]
    texture = low_pass(patches - patches.mean((1, 2), keepdim=True), 0.8).real
    texture = texture / texture.square().mean((1, 2), keepdim=True).sqrt().clamp_min(1e-3) + 1
    labels = torch.randint(8, (count,), generator=draw)
    angle = labels * math.pi / 4 + 0.3 * (torch.rand(count, generator=draw) - 0.5)
    slope = 0.1 + 0.3 * torch.rand(count, generator=draw)  # radians per pixel
    across = torch.cos(angle)[:, None, None] * places + torch.sin(angle)[:, None, None] * places[:, None]
    waver = low_pass(torch.randn(count, SIDE, SIDE, generator=draw), 0.3).real
    start = 2 * math.pi * torch.rand(count, 1, 1, generator=draw)
    phase = slope[:, None, None] * across + start + 1.5 * waver
    noise = torch.randn(2, count, SIDE, SIDE, generator=draw)
    z = texture * torch.polar(torch.ones(()), phase) + 0.7 * torch.complex(*noise)
    return torch.stack((z.real, z.imag), 1), labels


def small_cifar(split: str, count: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10 at 16x16, standardised."""
    part = opsin.data.open("cifar10").splits[split]
    pairs = [part[i] for i in range(count)]
    images = nn.functional.avg_pool2d(torch.stack([image for image, _ in pairs]), 2)
    return (images - images.mean()) / images.std(), torch.tensor([int(label) for _, label in pairs])


@torch.no_grad()
def exact(experiment: Experiment) -> None:
    op, x = ComplexConv(16, bias=False), torch.randn(4, 16, 12, 12)
    experiment.check("against conv2d on complex tensors (max error)", (op(x) - op.reference(x)).abs().max(), "<", 1e-5)
    turn = torch.polar(torch.ones(()), torch.tensor(0.7))
    turned = torch.complex(*x.chunk(2, 1)) * turn
    y = torch.complex(*op(x).chunk(2, 1)) * turn
    moved = torch.complex(*op(torch.cat((turned.real, turned.imag), 1)).chunk(2, 1))
    experiment.check("turning the phase before or after (max error)", (moved - y).abs().max(), "<", 1e-5)
    z = torch.complex(torch.randn(64, 8, 6, 6), torch.randn(64, 8, 6, 6))
    z = z + 0.8 * z.conj() * torch.polar(torch.ones(()), torch.tensor(1.0)) + (2 - 1j)
    _, (rr, ri, ii) = statistics(ComplexBatchNorm(8)(z), (0, 2, 3))
    worst = torch.stack(((rr - 1).abs(), ri.abs(), (ii - 1).abs())).max()
    experiment.check("covariance after batch norm less the identity (max)", worst, "<", 1e-3)


def scores(
    seed: int, data: tuple[Tensor, Tensor], unseen: tuple[Tensor, Tensor], channels: tuple[int, int], steps: int,
    augment: bool,
) -> tuple[list[float], list[int]]:  # fmt: skip
    """Accuracy of the three networks on unseen images, and their parameters. channels: complex net's, real nets'."""
    torch.manual_seed(seed)
    classes, (inner, outer) = int(data[1].max()) + 1, channels
    triple = comparison_triple(
        lambda w: network(w, inner, classes), WIDTH, input="pairs" if inner < outer else "zero",
        real_build=lambda w: network(w, outer, classes),
    )  # fmt: skip
    for net in triple:
        train(net, *data, steps=steps, seed=seed, batch=64, augment=augment)
    return [accuracy(net, *unseen) for net in triple], [real_parameters(net) for net in triple]


def run(budget: ClaimBudget) -> Evidence:
    seeds = range(max(5, budget.seeds))
    experiment = Experiment(
        "complex_cnn",
        "Where the phase of complex images matters, a complex CNN beats a real one with as many parameters.",
        data=f"BSDS500 patches of {SIDE}x{SIDE} times rising phases, {TRAIN} to train on and {TEST} to test, eight "
        f"directions; control: CIFAR-10 at {REAL_SIDE}x{REAL_SIDE}, {REAL_TRAIN} and {REAL_TEST}",
        baseline="CNN of equal width, and CNNx2 of equal real parameters (within 2 %)", seeds=seeds,
    )  # fmt: skip
    exact(experiment)
    photos = photographs()
    runs = [
        scores(
            seed, waves(photos["train"], TRAIN, seed), waves(photos["test"], TEST, seed + 1000), (1, 2), STEPS, False
        )
        for seed in seeds
    ]
    cnn, doubled, ours = (list(column) for column in zip(*(accuracies for accuracies, _ in runs), strict=True))
    sizes = runs[0][1]
    experiment.record("parameters", dict(zip(NAMES, sizes, strict=True)))
    experiment.check("parameters of CNNx2 off those of the complex CNN", abs(sizes[1] / sizes[2] - 1), "<=", 0.02)
    experiment.compare("directions: points over CNNx2", ours, doubled, 2.0)
    spread = float(torch.tensor(ours).sub(torch.tensor(doubled)).std())
    gain = float(torch.tensor(ours).mean() - torch.tensor(doubled).mean())
    experiment.check("directions: mean gain over CNNx2 less its spread over seeds", gain - spread, ">", 0.0)
    experiment.compare("directions: points over CNN", ours, cnn, 0.0)
    data, unseen = small_cifar("train", REAL_TRAIN), small_cifar("test", REAL_TEST)
    control = [scores(seed, data, unseen, (3, 3), REAL_STEPS, True)[0] for seed in seeds[:3]]
    experiment.record("CIFAR-10 without phase: accuracy", dict(zip(NAMES, zip(*control, strict=True), strict=True)))
    without = sum(complex_net - real for _, real, complex_net in control) / len(control)
    notes = (
        f"networks of four convolutions, width {WIDTH} (the complex one; 12 has no real match within 2 %), {STEPS} "
        f"steps of 64 images, {REAL_STEPS} on CIFAR-10; AdamW; heads are linear layers, whose magnitude the complex "
        "network gives. CIFAR-10 is recorded and no criterion: no gain is expected there. Measured there: "
        f"{without:+.1f} points over CNNx2 on average, against {gain:+.2f} on the directions; where the gain without "
        "phase is the larger one, phase is not what it comes from"
    )
    return experiment.evidence(budget, notes)
