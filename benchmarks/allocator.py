"""What does keeping freed memory (`opsin.train.allocator`) do for the time of a training step on a CPU?

    python benchmarks/allocator.py [--rounds 3] [--steps 8] [--threads 1]

Small MetaNets on batches of 128 CIFAR-sized images, each in a process of its own with and without it, in turns; the
median of all steps of all rounds. `times` is without over with. Peak resident memory is what it costs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional as F

import opsin
from opsin.measure.evidence import machine
from opsin.train.allocator import keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "allocator.json"
MIXERS = ("identity", "depthwise", "self_attention", "window_attention", "gabor_texture", "cross_d_conv")


def steps(mixer: str, keep: bool, count: int, threads: int) -> dict[str, object]:
    """Milliseconds of each step but the first, and the peak memory of this process in MiB."""
    torch.set_num_threads(threads)
    if keep and not keep_freed_memory():
        raise SystemExit("freed memory cannot be kept here")
    net = opsin.create("metanet_xt", mixer=mixer, image_size=32, num_classes=10)
    optimizer = torch.optim.AdamW(net.parameters())
    x, y, times = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,)), []
    for _ in range(count + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        times.append(1e3 * (time.perf_counter() - start))
    return {"ms": times[1:], "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        mixer, how = options.one
        print(json.dumps(steps(mixer, how == "kept", options.steps, options.threads)))
        return
    rows = []
    for mixer in MIXERS:
        times: dict[str, list[float]] = {"kept": [], "returned": []}
        memory: dict[str, list[float]] = {"kept": [], "returned": []}
        for turn in range(options.rounds):
            for how in sorted(times, reverse=turn % 2 == 1):
                command = [sys.executable, __file__, "--steps", str(options.steps), "--threads", str(options.threads)]
                out = subprocess.run([*command, "--one", mixer, how], capture_output=True, text=True, check=True)
                found = json.loads(out.stdout)
                times[how] += found["ms"]
                memory[how].append(found["MiB"])
        kept, returned = (statistics.median(times[how]) for how in ("kept", "returned"))
        peak = {how: statistics.median(values) for how, values in memory.items()}
        rows.append({
            "mixer": mixer, "ms": round(kept, 1), "times": round(returned / kept, 3),
            "memory": round(peak["kept"] / peak["returned"], 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    where = {"machine": machine(), "date": datetime.now(UTC).strftime("%Y-%m-%d"), "threads": options.threads}
    RESULTS.write_text(json.dumps({**where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
