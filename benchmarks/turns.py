"""Candidates take turns in one process, on the same tensors; what counts is the ratio of the medians."""

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Times = dict[str, list[float]]  # milliseconds of every candidate, round by round


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 5.0) -> dict[str, float]:
    """Median milliseconds of each."""
    return {name: statistics.median(times) for name, times in timed(candidates, rounds, seconds).items()}


def timed(candidates: Mapping[str, Callable[[], object]], rounds: int, seconds: float = 5.0) -> Times:
    """Milliseconds of each in every round, after one call of each that does not count, in a new order every round.

    Rounds stop, but not before the third, once all of them together took longer than `seconds`.
    """
    times: Times = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn, order in zip(range(rounds + 1), orders(list(candidates))):
        for name in order:
            start = time.perf_counter()
            candidates[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 3 and time.perf_counter() - begin > seconds:
            break
    return times


def repeated(parts: Iterable[tuple[str, ...]], processes: int = 3) -> dict[tuple[Any, ...], list[Times]]:
    """Times of a benchmark's parts, each in processes of its own, between which all others have their turn.

    A shared machine has slow phases, in which some microseconds of Python weigh more, and allocators change their ways
    with what they have seen. The script is run as `... --one PART`, and its last line is a JSON list of (place, times).
    """
    found: dict[tuple[Any, ...], list[Times]] = {}
    for turn, part in product(range(processes), list(parts)):
        command = [sys.executable, *sys.argv, "--one", *part]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for place, times in json.loads(output.splitlines()[-1]):
            found.setdefault((*part, *place), []).append(times)
        print(*part, f"process {turn + 1} of {processes}", flush=True)
    return found


def middle(runs: Sequence[Times], who: str, over: str) -> tuple[float, float, float]:
    """The ratio and its interval in the process whose ratio is the median of all processes'."""
    return sorted(ratio(times[who], times[over]) for times in runs)[len(runs) // 2]


def ratio(times: list[float], over: list[float]) -> tuple[float, float, float]:
    """Of the medians, and its 95 % interval when the rounds are drawn again (both of a round together) 2,000 times."""
    pairs = torch.tensor([times, over], dtype=torch.float64)
    drawn = pairs[:, torch.randint(len(times), (2000, len(times)), generator=torch.Generator().manual_seed(0))]
    low, high = (drawn[0].quantile(0.5, 1) / drawn[1].quantile(0.5, 1)).quantile(torch.tensor([0.025, 0.975]).double())
    return statistics.median(times) / statistics.median(over), float(low), float(high)


def told(value: float, low: float, high: float) -> str:
    """A ratio, with its interval where that is not all above 1."""
    return f"{value:.2f}" + (f" ({low:.2f} to {high:.2f})" if low < 1 else "")


def orders(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Orders without end: of up to four names every one of them equally often, of more a random choice.

    What ran before a candidate leaves its traces in the caches, so everybody must follow everybody else equally often:
    were one of two equals more often behind a third that empties the caches, it would look up to a tenth slower.
    """
    shuffled = random.Random(0)
    every = list(permutations(names)) if len(names) <= 4 else []
    while True:
        yield from shuffled.sample(every, len(every)) or [tuple(shuffled.sample(names, len(names)))]


def forward(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """One call without gradients."""

    def call() -> None:
        with torch.no_grad():
            run(x)

    return call


def training_step(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """One call and its backward pass to the input and whatever else requires a gradient."""
    x = x.detach().requires_grad_()

    def call() -> None:
        out = run(x)
        out.backward(torch.ones_like(out))

    return call


def peak_macs(dtype: torch.dtype, device: str = "cpu", side: int = 1024) -> float:
    """Multiply-adds per second of a large matrix product or 3 x 3 convolution: either may have the better library."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    x, kernels = torch.randn(1, 256, 28, 28, device=device), torch.randn(256, 256, 3, 3, device=device)
    x, kernels = (t.to(dtype, memory_format=torch.channels_last) for t in (x, kernels))
    ms = medians({"mm": lambda: a @ b, "conv": lambda: F.conv2d(x, kernels, padding=1)}, 25)
    return 1e3 * max(side**3 / ms["mm"], x.numel() * kernels[0].numel() / ms["conv"])


def bandwidth(device: str = "cpu", megabytes: int = 128) -> float:
    """Bytes per second, read and written, of a copy too large for the caches."""
    a = torch.randn(megabytes * 2**18, device=device)
    b = torch.empty_like(a)
    return 2 * 4 * a.numel() / (1e-3 * medians({"copy": lambda: b.copy_(a)}, 9)["copy"])
