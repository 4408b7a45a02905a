"""How much faster is neighborhood attention in tiles than with a copy of every window, and than dense attention?

    python benchmarks/neighborhood_attention.py [--threads 1] [--rounds 9] [--device cpu]

The candidates take turns in one process, on the same tensors; what counts is the ratio of the medians. `views` is the
usual CPU version written with `Tensor.unfold` (k^2 copies of keys and values made from strided views), `gather` the
better one with an index, `dense` all pairs under a mask.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from opsin.measure.evidence import machine
from opsin.ops.attention.neighborhood import Axis, neighborhood_attention

RESULTS = Path(__file__).parent / "results" / "neighborhood_attention.json"
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


def in_turn(candidates: dict[str, Callable[[], Tensor]], rounds: int, training: bool, cuda: bool) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(training):
                out = run()
            if training:
                out.square().sum().backward()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def compare(shape: tuple[int, ...], rounds: int, device: str) -> list[dict[str, object]]:
    n, side, heads, kernel, dilation = shape
    q, k, v = (torch.randn(n, side, side, heads, 32, device=device, requires_grad=True) for _ in range(3))
    bias = torch.randn(heads, 2 * kernel - 1, 2 * kernel - 1, device=device, requires_grad=True)
    found = []
    for biased in (False, True):
        runs: dict[str, Callable[[], Tensor]] = {
            backend: lambda b=backend, t=bias if biased else None: neighborhood_attention(
                q, k, v, kernel, dilation, bias=t, backend=b
            )
            for backend in ("block", "gather", "dense")
        }
        if dilation == 1 and not biased:
            runs["views"] = lambda: views(q, k, v, kernel)
        with torch.no_grad():
            exact = runs["dense"]()
            for name, run in runs.items():
                assert torch.allclose(run(), exact, atol=1e-4), f"{name} computes something else"
        for training in (False, True):
            medians = in_turn(runs, rounds, training, device != "cpu")
            ratios = {name: round(ms / medians["block"], 2) for name, ms in medians.items() if name != "block"}
            found.append({
                "samples": n, "map": side, "heads": heads, "kernel": kernel, "dilation": dilation, "bias": biased,
                "pass": "training step" if training else "forward", "block_ms": round(medians["block"], 2),
                "times_slower": ratios,
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
    rows = [row for shape in SHAPES for row in compare(shape, options.rounds, options.device)]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
