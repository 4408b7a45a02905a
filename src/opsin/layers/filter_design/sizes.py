"""How large, of which shape, how many: receptive fields, costs, and other filters that see as much.

    r_l = r_{l-1} + (k_l - 1) d_l prod_{i<l} s_i     parameters = C_out C_in k_h k_w / groups + C_out (with bias)
    MACs = parameters without biases times the positions of the output

Where branches meet, the wider field counts.
"""

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from opsin.errors import BadInput
from opsin.layers.filter_design.initialisers import evaluating
from opsin.layers.subpixel import SubPixelConv2d

Windowed = nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d
Pair = tuple[int, int]
RESAMPLERS = ("conv", "pool", "interpolate", "sampl", "pixel", "fold", "fft", "roll", "attention", "former")
"""What the names of modules and functions contain whose positions are not those of their input."""


class Field(NamedTuple):
    """Input pixels that a position sees, and those between neighbouring positions: by rows and columns."""

    size: Pair = (1, 1)
    stride: Pair = (1, 1)


def pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def after(field: Field, window: Windowed) -> Field:
    """One step of the recursion."""
    each = zip(field.size, field.stride, *(
        pair(v) for v in (window.kernel_size, window.stride, getattr(window, "dilation", 1))
    ), strict=True)  # fmt: skip
    steps = [(size + (taps - 1) * dilation * jump, jump * stride) for size, jump, taps, stride, dilation in each]
    return Field(*zip(*steps))


def widest(fields: list[Field]) -> Field:
    """Where branches meet."""
    return Field(*(tuple(max(side) for side in zip(*values)) for values in zip(*fields))) if fields else Field()


class Tracer(fx.Tracer):
    """Stops at windows of any class, which `after` knows, and goes into other modules that are not torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Windowed) or super().is_leaf_module(m, module_qualified_name)


def thinned(node: fx.Node, module: nn.Module | None, field: Field) -> Field:
    """The field after a node that is no window; where a map (n, c, h, w) is sliced with a step, positions part.

    Pooling to a single position leaves no map and counts for nothing, as means do. Raises BadInput for nodes that move
    positions in another way.
    """
    what = str(getattr(node.target, "__name__", node.target)) if module is None else type(module).__name__
    size = node.args[1] if module is None and len(node.args) > 1 else getattr(module, "output_size", None)
    to_one = "adaptive" in what.lower() and size in (1, (1, 1), [1, 1])
    if node.op.startswith("call") and any(word in what.lower() for word in RESAMPLERS) and not to_one:
        raise BadInput(f"{what} at '{node}' has no field by kernel and stride; measure the network's by seen_pixels")
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return field
    steps = [getattr(part, "step", None) or 1 for part in (*node.args[1], 1, 1, 1, 1)[2:4]]
    return Field(field.size, (field.stride[0] * steps[0], field.stride[1] * steps[1]))


def receptive_fields(model: nn.Module) -> dict[str, Field]:
    """The field after every convolution and pooling of images, by name.

    Follows the network's graph. Raises BadInput where torch.fx cannot trace it, and where it resamples in a way that
    kernel, stride and dilation do not tell, such as by interpolation, transposed convolution or a function instead of a
    module (use `seen_pixels`).
    """
    model = nn.Sequential(model) if isinstance(model, Windowed) else model
    try:
        graph = Tracer().trace(model)
    except Exception as error:
        raise BadInput(
            f"{type(model).__name__} cannot be traced ({error}); measure its field by seen_pixels"
        ) from error
    modules, known, found = dict(model.named_modules()), {}, {}
    for node in graph.nodes:
        field = widest([known[arg] for arg in node.all_input_nodes])
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, Windowed) and not isinstance(module, SubPixelConv2d) and len(node.all_input_nodes) == 1:
            known[node] = found[node.target] = after(field, module)
        else:
            known[node] = thinned(node, module, field)
    return found


def receptive_field(model: nn.Module) -> Field:
    """The widest field of the network. Raises BadInput where it has no windows, or cannot be traced."""
    fields = receptive_fields(model)
    if not fields:
        raise BadInput(f"{type(model).__name__} has no convolutions and no pooling")
    return widest(list(fields.values()))


def seen_pixels(model: nn.Module, size: tuple[int, int], channels: int = 3) -> tuple[int, int]:
    """Rows and columns of the input that the output's central position depends on, measured by a gradient.

    In eval mode, in which norms see only their position, and without a trace in the model.
    """
    x = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
    x = beside(model, x).requires_grad_()
    with evaluating(model), torch.enable_grad():
        y = model(x)
        if y.ndim != 4:
            raise BadInput(f"the field of a position is that of a map; the output has the shape {tuple(y.shape)}")
        centre = y[0, :, y.shape[2] // 2, y.shape[3] // 2].square().sum()
        seen = torch.autograd.grad(centre, x)[0].abs().amax((0, 1)) > 0
    rows, columns = (seen.any(axis).nonzero().flatten() for axis in (1, 0))
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


def beside(module: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """The tensor where the module's parameters are, in their precision."""
    first = next(module.parameters(), None)
    return x if first is None else x.to(first)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def conv_macs(module: nn.Module, size: tuple[int, int], channels: int) -> int:
    """Multiply-adds of the convolutions of a module on one map of `size`, in eval mode."""
    total = 0

    def count(conv: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        assert isinstance(conv, nn.Conv2d)
        total += conv.weight.numel() * output.shape[2:].numel()

    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, nn.Conv2d)]
    try:
        with evaluating(module):
            module(beside(module, torch.zeros(1, channels, *size)))
    finally:
        for handle in handles:
            handle.remove()
    return total


class Substitution(NamedTuple):
    """Another module for the same receptive field, with its costs over those of the original."""

    name: str
    module: nn.Module
    parameter_ratio: float
    mac_ratio: float


def _conv(conv: nn.Conv2d, inputs: int, outputs: int, size: Any, stride: Any = 1, **options: int) -> nn.Conv2d:
    """A 'same' convolution with the original's bias, device and dtype."""
    rows, columns = (size, size) if isinstance(size, int) else size
    dilation = options.get("dilation", 1)
    return nn.Conv2d(
        inputs, outputs, (rows, columns), stride, (dilation * (rows // 2), dilation * (columns // 2)),
        bias=conv.bias is not None, device=conv.weight.device, dtype=conv.weight.dtype, **options,
    )  # fmt: skip


def stacked(conv: nn.Conv2d) -> nn.Module:
    """(k - 1) / 2 layers of 3 x 3 with ReLU between them; the last has the stride."""
    c, m = conv.in_channels, conv.out_channels
    layers: list[nn.Module] = []
    for left in range(conv.kernel_size[0] // 2 - 1, -1, -1):
        layers += [_conv(conv, c, m, 3, 1 if left else conv.stride)] + [nn.ReLU()] * bool(left)
        c = m
    return nn.Sequential(*layers)


def separated(conv: nn.Conv2d) -> nn.Module:
    """k x 1, then 1 x k."""
    k, (rows, columns) = conv.kernel_size[0], conv.stride
    first = _conv(conv, conv.in_channels, conv.out_channels, (k, 1), (rows, 1))
    return nn.Sequential(first, _conv(conv, conv.out_channels, conv.out_channels, (1, k), (1, columns)))


def dilated(conv: nn.Conv2d) -> nn.Module:
    """3 x 3 taps, (k - 1) / 2 apart."""
    return _conv(conv, conv.in_channels, conv.out_channels, 3, conv.stride, dilation=conv.kernel_size[0] // 2)


def depthwise_separable(conv: nn.Conv2d) -> nn.Module:
    """k x k for each channel, then 1 x 1."""
    c = conv.in_channels
    return nn.Sequential(
        _conv(conv, c, c, conv.kernel_size[0], conv.stride, groups=c), _conv(conv, c, conv.out_channels, 1)
    )


SUBSTITUTIONS: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "stacked_3x3": stacked, "separated": separated, "dilated_3x3": dilated, "depthwise_separable": depthwise_separable,
}  # fmt: skip


def substitutions(conv: nn.Conv2d, size: tuple[int, int] = (32, 32)) -> dict[str, Substitution]:
    """Modules of the same receptive field, input and output shapes as an odd k x k convolution with 'same' padding.

    Raises BadInput for kernels below 3, even or not square, groups, dilation or another padding.
    """
    k = conv.kernel_size[0]
    plain = conv.groups == 1 and set(conv.dilation) == {1} and conv.padding in ((k // 2, k // 2), "same")
    if k < 3 or k % 2 == 0 or conv.kernel_size != (k, k) or not plain:
        raise BadInput(f"substitutions are for odd square kernels from 3 on with 'same' padding, not for {conv}")
    macs = conv_macs(conv, size, conv.in_channels)
    found = {}
    for name, make in SUBSTITUTIONS.items():
        other = make(conv)
        ratio = parameters(other) / parameters(conv)
        found[name] = Substitution(name, other, ratio, conv_macs(other, size, conv.in_channels) / macs)
    return found


def scaled_width(channels: int, multiplier: float, divisor: int = 8) -> int:
    """Channels times the multiplier, to the nearest multiple of `divisor`, but not more than a tenth below."""
    width = max(divisor, int(channels * multiplier + divisor / 2) // divisor * divisor)
    return width + divisor if width < 0.9 * channels * multiplier else width


def equal_width(build: Callable[[int], nn.Module], budget: int, widest: int = 4096, divisor: int = 1) -> int:
    """The largest width (a multiple of `divisor`) whose network has at most `budget` parameters.

    What comparisons of filter sizes need: without equal parameters they prove nothing. Raises BadInput where the
    narrowest has too many already.
    """
    low, high = 1, widest // divisor
    with torch.device("meta"):
        if parameters(build(divisor)) > budget:
            raise BadInput(f"a network of width {divisor} has more than {budget} parameters already")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if parameters(build(middle * divisor)) <= budget else (low, middle - 1)
    return low * divisor
