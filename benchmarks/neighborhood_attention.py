"""How much faster is neighborhood attention in tiles than with a copy of every window, and than dense attention?

    python benchmarks/neighborhood_attention.py [--threads 1] [--rounds 9] [--device cpu]

The candidates take turns in one process, on the same tensors; what counts is the ratio of the medians. `views` is the
usual CPU version written with `Tensor.unfold` (k^2 copies of keys and values made from strided views), `gather` the
better one with an index, `dense` all pairs under a mask. On a CUDA device the fused kernels (`triton`) and PyTorch's
compiled FlexAttention under the same rule (`flex`) join, on 8 times the samples, in float32 and float16.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from opsin.measure.evidence import machine
from opsin.ops.attention.neighborhood import Axis, flex_mask, neighborhood_attention, rule

RESULTS = Path(__file__).parent / "results"
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2}
# samples, side of the map, heads of 32 channels, kernel, dilation: NAT's first three levels, one dilated, one small
SHAPES = [(4, 56, 2, 7, 1), (1, 56, 4, 7, 1), (4, 56, 2, 7, 8), (4, 48, 2, 7, 1), (4, 28, 4, 7, 1), (4, 56, 2, 13, 1)]


def views(q: Tensor, k: Tensor, v: Tensor, kernel: int) -> Tensor:
    """The common way: all windows by `unfold`, the outermost repeated for the border. No dilation."""
    rows, columns = (torch.as_tensor(Axis(side, kernel).windows()[0]) for side in q.shape[1:3])

    def windows(x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2, 4).unfold(2, kernel, 1).unfold(3, kernel, 1)
        return x[:, :, rows][:, :, :, columns].flatten(-2)

    logits = (q.permute(0, 3, 1, 2, 4) * q.shape[-1] ** -0.5).unsqueeze(-2) @ windows(k)
    return (windows(v) @ logits.softmax(-1).transpose(-1, -2)).squeeze(-1).permute(0, 2, 3, 1, 4)


def flexible(q: Tensor, kernel: int, dilation: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention over flattened tokens with the rule as a block mask, compiled; the mask is made once."""
    size = q.shape[1] * q.shape[2]
    axes = rule(q.shape[1:3], kernel, dilation)
    mask = create_block_mask(flex_mask(axes, q.device), None, None, size, size, device=q.device, _compile=True)
    attend = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
        return attend(*flat, block_mask=mask).transpose(1, 2).unflatten(1, q.shape[1:3])

    return run


def in_turn(candidates: dict[str, Callable[[], Tensor]], rounds: int, training: bool, cuda: bool) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    wait = torch.cuda.synchronize if cuda else lambda: None
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            wait()
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = run()
            if training:
                out.square().sum().backward()
            wait()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def candidates(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, kernel: int, dilation: int
) -> dict[str, Callable[[], Tensor]]:
    """By name; the first is the definition."""
    names = ["dense", "block", "gather", *(["triton"] if q.is_cuda else [])]
    runs: dict[str, Callable[[], Tensor]] = {
        name: partial(neighborhood_attention, q, k, v, kernel, dilation, bias=bias, backend=name) for name in names
    }
    if dilation == 1 and bias is None:
        runs["views"] = partial(views, q, k, v, kernel)
    if q.is_cuda and bias is None:
        runs["flex"] = partial(flexible(q, kernel, dilation), q, k, v)
    return runs


def compare(shape: tuple[int, ...], rounds: int, device: str, dtype: torch.dtype) -> list[dict[str, object]]:
    n, side, heads, kernel, dilation = shape
    cuda = device != "cpu"
    ours = "triton" if cuda else "block"
    options = dict(device=device, dtype=dtype, requires_grad=True)
    q, k, v = (torch.randn(n, side, side, heads, 32, **options) for _ in range(3))
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, **options)
    found = []
    for biased in (False, True):
        runs = candidates(q, k, v, bias if biased else None, kernel, dilation)
        with torch.no_grad():
            exact = runs["dense"]()
            for name, run in runs.items():
                assert torch.allclose(run(), exact, atol=TOLERANCE[dtype]), f"{name} computes something else"
        for training in (False, True):
            medians = in_turn(runs, rounds, training, cuda)
            ratios = {name: round(ms / medians[ours], 2) for name, ms in medians.items() if name != ours}
            found.append({
                "samples": n, "map": side, "heads": heads, "kernel": kernel, "dilation": dilation, "bias": biased,
                "type": str(dtype).removeprefix("torch."), "pass": "training step" if training else "forward",
                f"{ours}_ms": round(medians[ours], 3), "times_slower": ratios,
            })  # fmt: skip
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device != "cpu"
    types = (torch.float32, torch.float16) if cuda else (torch.float32,)
    shapes = [(8 * n, *rest) for n, *rest in SHAPES] if cuda else SHAPES
    rows = [row for t in types for shape in shapes for row in compare(shape, options.rounds, options.device, t)]
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"neighborhood_attention{'_cuda' if cuda else ''}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
