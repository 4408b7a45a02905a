"""How long one forward pass takes: warm-up, then the median and the spread of single calls."""

import copy
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opsin.errors import BadInput, UnknownName

MODES = ("eager", "channels_last", "bf16", "compiled")


@dataclass(frozen=True)
class Latency:
    """Milliseconds per call. `iqr_ms` is the distance between the quartiles of the `runs` calls."""

    median_ms: float
    iqr_ms: float
    runs: int
    threads: int
    device: str = "cpu"


def latency(
    model: nn.Module, inputs: Tensor | tuple[Tensor, ...], mode: str = "eager", *, repeats: int = 20,
    warmup: int = 3, max_seconds: float = 30.0,
) -> Latency:  # fmt: skip
    """Times `model(*inputs)` in eval mode without gradients; the model that was passed is left as it was.

    mode: "eager", "channels_last", "bf16" (weights and input in bfloat16), "compiled" (torch.compile), or several
        joined by a plus sign ("channels_last+bf16").
    repeats: timed calls; fewer, but at least three, where they would take longer than `max_seconds`.
    Raises UnknownName (mode), BadInput where the mode does not run on this machine.
    """
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    trained = model.training
    prepared, inputs = prepare(model, inputs, mode)
    try:
        with torch.no_grad():
            for _ in range(max(1, warmup)):
                prepared(*inputs)
            times = _times(prepared, inputs, repeats, max_seconds)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error.inner_exception).splitlines()[0]
        raise BadInput(f"the mode '{mode}' cannot run here: torch.compile says '{reason}'") from error
    finally:
        model.train(trained)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Latency(statistics.median(times), high - low, len(times), torch.get_num_threads(), str(inputs[0].device))


def prepare(model: nn.Module, inputs: tuple[Tensor, ...], mode: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the model, and the inputs, as the mode wants them ("eager": the model itself), in eval mode."""
    parts = mode.split("+")
    for part in parts:
        if part not in MODES:
            raise UnknownName("mode", part, MODES)
    if parts != ["eager"]:
        model = copy.deepcopy(model)
    model.eval()
    if "bf16" in parts:
        model = model.to(torch.bfloat16)
        inputs = tuple(x.to(torch.bfloat16) if x.is_floating_point() else x for x in inputs)
    if "channels_last" in parts:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
    if "compiled" in parts:
        model = torch.compile(model)  # type: ignore[assignment]
    return model, inputs


def _times(model: nn.Module, inputs: tuple[Tensor, ...], repeats: int, max_seconds: float) -> list[float]:
    cuda = inputs[0].is_cuda
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < max(3, repeats):
        start = time.perf_counter()
        model(*inputs)
        if cuda:
            torch.cuda.synchronize(inputs[0].device)
        stop = time.perf_counter()
        times.append((stop - start) * 1e3)
        if stop - begin > max_seconds and len(times) >= 3:
            break
    return times
