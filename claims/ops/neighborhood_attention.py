"""Neighborhood attention's claim: tiles compute the definition exactly, faster, and in memory that ignores the window.

Exact: all implementations agree with dense masked attention in float64, gradients included; every token has k^n
neighbours; a window as large as the map is self-attention; the interior is equivariant to shifts. Cost: multiplications
linear in the tokens, scratch memory independent of the window. Timed on this machine's processor, candidates in turn.
"""

import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_mask

from opsin.measure.cost import count_macs
from opsin.measure.evidence import ClaimBudget, Evidence, Experiment
from opsin.measure.memory import LiveTensors
from opsin.ops.attention.neighborhood import flex_mask, neighborhood_attention, rule
from opsin.ops.attention.neighborhood_attention import NeighborhoodAttention

CASES = 120


def random_case(draw: random.Random, axes: int) -> tuple[list[int], list[int], list[int], list[bool]]:
    """Space, kernel, dilation and causality per axis."""
    kernel = [draw.randint(1, 7 if axes < 3 else 4) for _ in range(axes)]
    dilation = [draw.randint(1, 3) for _ in range(axes)]
    space = [k * d + draw.randint(0, 12 if axes < 3 else 3) for k, d in zip(kernel, dilation)]
    return space, kernel, dilation, [draw.random() < 0.4 for _ in range(axes)]


def parity() -> float:
    """The largest absolute difference to the dense definition over random cases, gradients and biases included."""
    draw, worst = random.Random(0), 0.0
    for n in range(CASES):
        space, kernel, dilation, causal = random_case(draw, 1 + n % 3)
        inputs = [torch.randn(2, *space, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        bias = None
        if n % 2:
            bias = torch.randn(2, *(2 * k - 1 for k in kernel), dtype=torch.float64, requires_grad=True)
        weight, results = torch.randn_like(inputs[2]), []
        for backend in ("dense", "block", "gather"):
            y = neighborhood_attention(*inputs, kernel, dilation, causal, bias=bias, backend=backend)
            wanted = inputs if bias is None else [*inputs, bias]
            results.append([y, *torch.autograd.grad((y * weight).sum(), wanted)])
        for other in results[1:]:
            worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in zip(results[0], other, strict=True)))
    return worst


def wrong_neighbourhoods() -> int:
    """Tokens of non-causal random cases that do not see exactly k^n others."""
    draw, wrong = random.Random(1), 0
    for n in range(30):
        space, kernel, dilation, _ = random_case(draw, 1 + n % 3)
        size = torch.Size(space).numel()
        mask = create_mask(flex_mask(rule(space, kernel, dilation)), 1, 1, size, size, device="cpu")[0, 0]
        wrong += int((mask.sum(1) != torch.Size(kernel).numel()).sum())
    return wrong


@torch.no_grad()
def against_self_attention() -> float:
    q, k, v = torch.randn(3, 2, 6, 7, 2, 8, dtype=torch.float64).unbind()
    plain = F.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    return float((neighborhood_attention(q, k, v, (6, 7)).flatten(1, 2) - plain).abs().max())


@torch.no_grad()
def equivariance() -> float:
    """The largest difference inside, between attention of rolled maps and rolled attention."""
    q, k, v = torch.randn(3, 1, 30, 30, 2, 8, dtype=torch.float64).unbind()
    rolled = neighborhood_attention(*(t.roll((3, 5), (1, 2)) for t in (q, k, v)), 7)
    inner = (slice(None), slice(7, -4), slice(9, -4))
    return float((rolled[inner] - neighborhood_attention(q, k, v, 7).roll((3, 5), (1, 2))[inner]).abs().max())


def multiplications(side: int, kernel: int) -> int:
    """Of the attention alone, without the projections."""
    dim = 64
    with torch.device("meta"):
        op = NeighborhoodAttention(dim, kernel_size=kernel)
        return count_macs(op, torch.empty(1, dim, side, side)) - 4 * side**2 * dim**2


def scratch(backend: str, kernel: int, training: bool) -> int:
    """Bytes alive at the worst moment beyond query, key and value, for 8 maps of 48x48 with 2 heads of 16."""
    known = [torch.randn(8, 48, 48, 2, 16, requires_grad=training) for _ in range(3)]
    with LiveTensors(known) as memory, torch.set_grad_enabled(training):
        y = neighborhood_attention(*known, kernel, backend=backend)
        if training:
            y.square().sum().backward()
    return memory.peak - sum(t.untyped_storage().nbytes() for t in known)


def medians(side: int, training: bool, rounds: int) -> dict[str, float]:
    """Milliseconds of each implementation at k = 7, in turn, for 2 maps with 2 heads of 32."""
    q, k, v = (torch.randn(2, side, side, 2, 32, requires_grad=training) for _ in range(3))
    runs: dict[str, Callable[[], Tensor]] = {
        name: lambda name=name: neighborhood_attention(q, k, v, 7, backend=name)
        for name in ("block", "gather", "dense")
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, attend in runs.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                y = attend()
            if training:
                y.square().sum().backward()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def run(budget: ClaimBudget) -> Evidence:
    torch.manual_seed(0)
    experiment = Experiment(
        "neighborhood_attention",
        "Attention in tiles equals the definition, in time linear in the tokens and memory that ignores the window.",
        data="random tensors", baseline="a copy of every window (gather), and dense attention under a mask",
    )  # fmt: skip
    experiment.check(f"largest difference to the definition, {CASES} random cases", parity(), "<", 1e-10)
    experiment.check("tokens without exactly k^n neighbours", wrong_neighbourhoods(), "==", 0)
    experiment.check("window as large as the map against self-attention", against_self_attention(), "<", 1e-10)
    experiment.check("shift equivariance inside (max error)", equivariance(), "<", 1e-10)

    counts = {f"{side}x{side}, k={k}": multiplications(side, k) for side in (14, 28, 56) for k in (3, 7)}
    experiment.record("multiply-adds of the attention", counts)
    experiment.check(
        "multiply-adds less 2 n k^2 dim", counts["56x56, k=7"] - 2 * 56**2 * 49 * 64, "==", 0, "n tokens of dim 64"
    )
    for training in (False, True):
        step = "training step" if training else "forward"
        used = {f"block, k={k}": scratch("block", k, training) for k in (5, 7, 13, 21)}
        used |= {f"gather, k={k}": scratch("gather", k, training) for k in (3, 5, 7)}
        experiment.record(f"scratch bytes, {step}", used)
        growth = used["block, k=21"] / used["block, k=5"]
        experiment.check(f"scratch of k = 21 over that of k = 5, tiles, {step}", growth, "<", 1.1)
        growth = used["gather, k=7"] / used["gather, k=3"]
        experiment.check(f"scratch of k = 7 over that of k = 3, copies, {step}", growth, ">", 3.0)

    for training, step in ((False, "forward"), (True, "training step")):
        times = {f"{side}x{side}": medians(side, training, rounds=7) for side in (14, 28, 48, 56)}
        experiment.record(f"milliseconds, {step}", times)
        at_48, at_56 = times["48x48"], times["56x56"]
        experiment.check(f"dense time over tile time, 48x48, {step}", at_48["dense"] / at_48["block"], ">", 1.0)
        experiment.check(f"copying time over tile time, 56x56, {step}", at_56["gather"] / at_56["block"], ">", 3.0)
    return experiment.evidence(budget, "The fused kernels' timing on a GPU belongs to the Triton backend.")
