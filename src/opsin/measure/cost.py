"""What a network costs: parameters, multiply-accumulates, activations, peak memory and latency.

The counts need no memory: a network that is named is built on the meta device, where tensors have shapes but no values.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from opsin.catalog import card_of, create, parse_spec
from opsin.errors import BadInput
from opsin.measure.latency import Latency, latency
from opsin.measure.memory import peak_memory

aten = torch.ops.aten
PRODUCTS = {
    aten.convolution, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten._convolution,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The cost of one network on one input size. Counts and memory are for the whole batch, memory is in bytes."""

    name: str
    input: tuple[int, ...]
    params: int
    macs: int
    activations: int
    peak_memory_forward: int | None = None
    peak_memory_train: int | None = None
    latency: dict[str, Latency] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self) | {"input": list(self.input)}

    def rows(self) -> list[tuple[str, str]]:
        """What was measured, in words and readable units."""
        rows = [
            ("input", "x".join(map(str, self.input))),
            ("parameters", _readable(self.params)),
            ("MACs", _readable(self.macs)),
            ("activations", _readable(self.activations)),
        ]
        for title, size in (("forward", self.peak_memory_forward), ("training step", self.peak_memory_train)):
            if size is not None:
                rows.append((f"peak memory, {title}", f"{size / 2**20:.1f} MiB"))
        for mode, t in self.latency.items():
            where = f"{t.threads} thread{'s' if t.threads > 1 else ''}" if t.device == "cpu" else t.device
            spread = f"median of {t.runs}, interquartile range {t.iqr_ms:.2f} ms, {where}"
            rows.append((f"latency, {mode}", f"{t.median_ms:.2f} ms ({spread})"))
        return rows

    def table(self) -> Any:
        """The same as a rich table."""
        from rich.table import Table

        table = Table(title=self.name, title_justify="left", box=None, pad_edge=False, show_header=False)
        for row in self.rows():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        return "\n".join([self.name, *(f"{name:28}{value}" for name, value in self.rows())])


def measure(
    model: nn.Module | str, input_size: int | tuple[int, int] = 224, *, channels: int = 3, batch: int = 1,
    modes: Sequence[str] = ("eager",), training: bool = False, device: str | torch.device = "cpu", repeats: int = 20,
) -> Cost:  # fmt: skip
    """Measures a network on random images.

    model: a module, or a name or spec of the catalogue. A name that is only counted (`modes=()`, `training=False`) is
        never built with values, so that the largest published variants need no memory.
    input_size: side in pixels, or (height, width).
    modes: latencies to take, each of "eager", "channels_last", "bf16", "compiled", or several joined by "+".
    training: also the peak memory of an AdamW training step.
    Raises UnknownName (model, mode), BadInput where the network does not take such an input.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    shape = (batch, channels, height, width)
    if min(shape) < 1:
        raise BadInput(f"an input of {'x'.join(map(str, shape))} is empty; every number must be at least 1")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise BadInput(f"there is no CUDA device here for '{device}'; measure with device cpu")
    name = model if isinstance(model, str) else type(model).__name__
    real = bool(modes) or training or isinstance(model, nn.Module)
    built = None if isinstance(model, str) else model.to(device)
    params, macs, activations = _counts(model, built, shape, name)
    if built is None and real:
        built = _build(name, channels).to(device)
    if built is None:
        return Cost(name, shape, params, macs, activations)
    x = torch.randn(shape, device=_place(built, device))
    if x.is_meta:
        return Cost(name, shape, params, macs, activations)
    with _named(name, shape):
        return Cost(
            name, shape, params, macs, activations,
            peak_memory_forward=peak_memory(built, (x,)),
            peak_memory_train=peak_memory(built, (x,), training=True) if training else None,
            latency={mode: latency(built, x, mode, repeats=repeats) for mode in modes},
        )  # fmt: skip


def count_params(model: nn.Module) -> int:
    """Parameters, trainable or not; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of one forward pass in eval mode, on whatever device model and input are (meta included).

    Convolutions and matrix products count, and attention as its two products; norms, activations, pooling and FFTs do
    not, which is the convention of published tables. A custom operator counts if it registers a formula with
    `torch.utils.flop_counter.register_flop_formula`.
    """
    return _count(model, inputs)[0]


def count_activations(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> int:
    """Elements that convolutions and matrix products write in one forward pass (Radosavovic et al., 2003.13678)."""
    return _count(model, inputs)[1]


class _ProductOutputs(TorchDispatchMode):
    """Adds up the elements of what convolutions and matrix products return."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in PRODUCTS:
            self.elements += out.numel()
        return out


def _matrix_vector_flop(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * prod(matrix)


def _count(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> tuple[int, int]:
    """(MACs, activations). Attention runs as two matrix products, so that both are seen on every device."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    flops = FlopCounterMode(display=False, custom_mapping={aten.mv: _matrix_vector_flop})
    trained = model.training
    model.eval()
    try:
        with torch.no_grad(), _unfused(), flops, _ProductOutputs() as outputs:
            model(*inputs)
    finally:
        model.train(trained)
    return flops.get_total_flops() // 2, outputs.elements


@contextmanager
def _unfused() -> Iterator[None]:
    """Attention as its matrix products: no fused kernel of SDPA, no fast path of nn.MultiheadAttention."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _counts(model: nn.Module | str, built: nn.Module | None, shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """Parameters, MACs and activations; on the meta device, unless the forward pass needs values.

    There operators that are faster with more multiplications (attention in tiles) run as they are defined.
    """
    if isinstance(model, str):
        try:
            with torch.device("meta"):
                shadow = _build(model, shape[1])
                return count_params(shadow), *_count(shadow, torch.empty(shape))
        except (NotImplementedError, RuntimeError, TypeError):
            built = _build(model, shape[1])  # it branches on values; what is wrong otherwise shows here again
    assert built is not None
    try:
        return count_params(built), *_count(_shadow(built), torch.empty(shape, device="meta"))
    except (RuntimeError, ValueError, IndexError, AssertionError, TypeError):  # as above
        x = torch.zeros(shape, device=_place(built, "cpu"))
    with _named(name, shape):
        return count_params(built), *_count(built, x)


def _shadow(model: nn.Module) -> nn.Module:
    """A copy of a network on the meta device, which takes no memory."""
    held: list[Tensor] = [*model.parameters(), *model.buffers()]
    memo = {id(t): t.detach().to("meta") for t in held}
    memo |= {id(p): nn.Parameter(memo[id(p)], p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _build(spec: str, channels: int) -> nn.Module:
    """The named network; a backbone takes as many channels as the input has, unless the spec says otherwise."""
    name, options = parse_spec(spec)
    backbone = name.startswith("timm:") or card_of(name).kind == "backbone"
    wanted: dict[str, Any] = {"in_chans": channels} if backbone and channels != 3 and "in_chans" not in options else {}
    system = create(spec, **wanted)
    if not isinstance(system, nn.Module):
        raise BadInput(f"'{spec}' is not a network, so there is nothing to measure")
    return system


def _place(model: nn.Module, default: str | torch.device) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device(default))


@contextmanager
def _named(name: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Turns an operator's complaint about the input into a sentence."""
    try:
        yield
    except TypeError as error:
        if "required positional argument" not in str(error):
            raise
        raise BadInput(f"'{name}' takes more than an image, so it cannot be measured by its name: {error}") from error
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"'{name}' does not run on an input of {'x'.join(map(str, shape))}: {reason}") from error


def _readable(count: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3f} {unit}"
    return str(count)


__all__ = [
    "Cost", "Latency", "count_activations", "count_macs", "count_params", "latency", "measure", "peak_memory",
]  # fmt: skip
