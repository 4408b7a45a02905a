"""Im2win's claim: the same numbers as any convolution, from a copy k_w W_o / W times smaller, on most layers faster.

Exact: the 12 layers of the paper's benchmark, and a grid of kernels 1 to 11, strides 1 to 4 and paddings. Measured: the
bytes of both copies, and the time of both ways on the CPU, taken in turns.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.ops.conv.im2win import (
    LAYERS,
    channels_last_windows,
    im2col_conv2d,
    im2col_numel,
    im2win_conv2d,
    im2win_numel,
    image_to_windows,
)

BATCH, LARGE = 8, 1  # images; conv4 has a map of 64 channels and 224 x 224, of which one is enough
ROUNDS = 9


def operands(name: str) -> tuple[Tensor, Tensor]:
    layer = LAYERS[name]
    batch = LARGE if name == "conv4" else BATCH
    depth = layer.channels * layer.kernel**2
    weight = torch.randn(layer.filters, layer.channels, layer.kernel, layer.kernel) / depth**0.5
    return torch.randn(batch, layer.channels, layer.size, layer.size), weight


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def grid_error() -> float:
    """The largest error over small maps, kernels 1 to 11, strides 1 to 4, and with or without padding."""
    worst = 0.0
    for kernel in (1, 2, 3, 5, 7, 11):
        for stride in (1, 2, 3, 4):
            for padding in (0, kernel // 2):
                x, weight = torch.randn(2, 3, 23, 26), torch.randn(5, 3, kernel, kernel) / kernel
                steps, pads = (stride, stride), (padding, padding)
                y = im2win_conv2d(x, weight, None, steps, pads, "plain")
                worst = max(worst, relative(y, F.conv2d(x, weight, None, stride, padding)))
    return worst


def milliseconds(run: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def layer(experiment: Experiment, name: str) -> tuple[float, float, float, float]:
    """Error, bytes of the copy over those of the formula, im2col's bytes over ours, and its time over ours."""
    x, weight = operands(name)
    kernel, stride = (LAYERS[name].kernel,) * 2, (LAYERS[name].stride,) * 2
    none = (0, 0)
    ways = {
        "im2win": lambda: im2win_conv2d(x, weight, None, stride, none, "plain"),
        "im2col": lambda: im2col_conv2d(x, weight, None, stride, none),
        "library": lambda: F.conv2d(x, weight, None, stride),
    }
    error = max(relative(ways[way](), ways["library"]()) for way in ("im2win", "im2col"))
    copies = [image_to_windows(x, kernel[0], stride[0]), channels_last_windows(x, kernel[0], stride[0])]
    measured = {c.untyped_storage().nbytes() for c in copies}
    columns = F.unfold(x, kernel, stride=stride).untyped_storage().nbytes()
    assert columns == 4 * im2col_numel(x.shape, kernel, stride)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, run in ways.items():
            times[way].append(milliseconds(run))
    medians = {way: statistics.median(series) for way, series in times.items()}
    experiment.record(f"{name}: ms, batch {len(x)}", medians)
    formula = 4 * im2win_numel(x.shape, kernel, stride)
    return error, max(measured) / formula, columns / max(measured), medians["im2col"] / medians["im2win"]


def run(budget: ClaimBudget) -> Evidence:
    torch.manual_seed(0)
    experiment = Experiment(
        "im2win",
        "Convolutions computed from window-ordered copies equal ordinary ones; the copy is k_w W_o / W times smaller "
        "than im2col's, and on most layers the whole is faster than im2col with a matrix product.",
        data=f"random maps and filters of the 12 published layers, batch {BATCH} ({LARGE} for conv4) instead of 128",
        baseline="torch.nn.functional.unfold and one matrix product", seeds=[0],
    )  # fmt: skip
    experiment.check("kernels 1 to 11, strides 1 to 4, paddings (largest relative error)", grid_error(), "<", 1e-5)
    results = {name: layer(experiment, name) for name in LAYERS}
    errors, bytes_, savings, speedups = ({n: r[i] for n, r in results.items()} for i in range(4))
    experiment.check("12 layers against F.conv2d (largest relative error)", max(errors.values()), "<", 1e-5)
    experiment.check("bytes of the copy over N C Ho W kh 4 (largest)", max(bytes_.values()), "==", 1.0)
    experiment.check("bytes of the copy over N C Ho W kh 4 (smallest)", min(bytes_.values()), "==", 1.0)
    expected = {n: v.kernel * v.out_size / v.size for n, v in LAYERS.items()}
    gap = max(abs(savings[n] - expected[n]) for n in LAYERS)
    experiment.check("im2col's bytes over ours against kw Wo / W (largest difference)", gap, "<", 1e-6)
    smaller = sum(savings[n] > 1 for n, v in LAYERS.items() if v.stride < v.kernel)
    experiment.check("layers with s < kw whose copy is smaller, of 12", smaller, "==", 12)
    experiment.check("layers on which it is faster than im2col, of 12", sum(v > 1 for v in speedups.values()), ">=", 8)
    experiment.record("im2col's bytes over ours", savings)
    experiment.record("im2col's time over ours", speedups)
    notes = (
        f"CPU, {torch.get_num_threads()} thread(s), float32; medians of {ROUNDS} runs taken in turns. PyTorch's own "
        "convolution is recorded beside them, not judged; the paper's figures for CUDA are not tested here"
    )
    return experiment.evidence(budget, notes)
