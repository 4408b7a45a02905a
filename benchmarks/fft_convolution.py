"""Is the FFT long convolution at least as fast as the composition of torch.fft, on sequences of 256 to 32768?

    python benchmarks/fft_convolution.py [--rounds 201] [--threads 1] [--device cpu]

`composition` is the common one, rfft of 2L, product, irfft; candidates take turns, and what is given is its median over
ours, with the 95 % interval of that, in the middle one of three processes. A causal convolution of 64 features, 2
sequences, plain and with two gates; forward, and forward with backward. On a CPU everything is timed twice: with an
allocator that returns freed memory to the system, where large tensors come as fresh pages, and with one that keeps it,
as `fit` does; and every length in processes of its own, minutes apart. On CUDA the fused Triton kernel is a
candidate of its own.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from opsin.measure.evidence import machine
from opsin.ops.spectral.flashfftconv import fft_conv
from opsin.train.allocator import keep_freed_memory
from turns import Times, forward, middle, repeated, timed, told, training_step

RESULTS = Path(__file__).parent / "results" / "fft_convolution.json"
LENGTHS = (256, 511, 1024, 3000, 4096, 16384, 32768)


def composition(u: Tensor, k: Tensor, gates: tuple[Tensor | None, Tensor | None]) -> Tensor:
    length = u.shape[-1]
    u = u if gates[0] is None else u * gates[0]
    y_f = torch.fft.rfft(u, n=2 * length) * torch.fft.rfft(k, n=2 * length)
    y = torch.fft.irfft(y_f, n=2 * length)[..., :length]
    return y if gates[1] is None else y * gates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=201)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.one:
        memory, length = options.one
        if memory == "kept":
            keep_freed_memory()
        print(json.dumps(list(measured(int(length), options.device, options.rounds))))
        return
    memories = ("returned", "kept") if options.device == "cpu" and keep_freed_memory() else ("returned",)
    rows = [compared(*place, runs) for place, runs in repeated(product(memories, map(str, LENGTHS))).items()]
    rows.sort(key=lambda row: (row["length"], row["gated"], row["pass"]))
    where = {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    RESULTS.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")
    lines = ["| length | gated | pass | freed memory is | ms | composition / opsin |", "|" + " --- |" * 6]
    for row in rows:
        lines.append(f"| {row['length']} | {'yes' if row['gated'] else 'no'} | {row['pass'].replace('_', ' ')} | "
                     f"{row['memory']} | {row['ms']:.2f} | {told(*row['composition'])} |")  # fmt: skip
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


def compared(memory: str, length: str, gated: bool, step: str, runs: list[Times]) -> dict[str, Any]:
    """Milliseconds of ours, and the other candidates' times over it."""
    ms = median(median(times["opsin"]) for times in runs)
    row = {"length": int(length), "gated": gated, "pass": step, "memory": memory, "ms": round(ms, 4)}
    others = [who for who in runs[0] if who != "opsin"]
    return {**row, **{who: [round(value, 3) for value in middle(runs, who, "opsin")] for who in others}}


def measured(length: int, device: str, rounds: int) -> Iterator[tuple[tuple[bool, str], Times]]:
    """Whether it is gated, the pass, and every candidate's milliseconds."""
    u, gate = (torch.randn(2, 64, length, device=device) for _ in range(2))
    k = torch.randn(64, length, device=device, requires_grad=True)
    for gates in ((None, None), (gate, gate)):
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            "opsin": lambda x, g=gates: fft_conv(x, k, g),
            "composition": lambda x, g=gates: composition(x, k, g),
        }
        if u.is_cuda:
            runs["torch.fft engine"] = lambda x, g=gates: fft_conv(x, k, g, backend="fft")
        for step in (forward, training_step):
            times = timed({who: step(run, u) for who, run in runs.items()}, rounds)
            yield (gates[0] is not None, step.__name__), times


if __name__ == "__main__":
    main()
