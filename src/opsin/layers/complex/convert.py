"""A real convolutional network as a complex one, and the three networks of a fair comparison.

Layers with parameters are replaced one by one. What has none (activations, pooling, resizing, dropout) is caught where
the network calls it, whether as a module, a function or a method: on complex tensors it becomes its complex form.
Attention and gates (GLU) have no such form here.
"""

import re
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from opsin.errors import BadInput
from opsin.layers.complex import linear
from opsin.layers.complex.activation import magnitude
from opsin.layers.complex.norm import ComplexBatchNorm, ComplexGroupNorm, ComplexLayerNorm, ComplexLayerNorm2d
from opsin.layers.norm import LayerNorm2d
from opsin.layers.replace import with_layers_replaced

CONVOLUTIONS = {
    nn.Conv1d: linear.ComplexConv1d, nn.Conv2d: linear.ComplexConv2d, nn.Conv3d: linear.ComplexConv3d,
    nn.ConvTranspose1d: linear.ComplexConvTranspose1d, nn.ConvTranspose2d: linear.ComplexConvTranspose2d,
    nn.ConvTranspose3d: linear.ComplexConvTranspose3d,
}  # fmt: skip
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
ACTIVATIONS = frozenset((
    "relu", "relu_", "relu6", "gelu", "silu", "leaky_relu", "elu", "mish", "hardswish", "hardtanh", "softplus", "selu",
    "celu", "log_sigmoid",
))  # fmt: skip
BY_PARTS = frozenset((
    *(f"{kind}_pool{d}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)),
    "interpolate", "sigmoid", "hardsigmoid",
))  # fmt: skip
DROPOUTS = frozenset(("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"))
NO_FORM = (nn.GLU, nn.MultiheadAttention, nn.modules.instancenorm._InstanceNorm)
REAL_ONLY = re.compile("not (implemented|supported) for '?complex|does not support complex", re.IGNORECASE)
Activation = Callable[[Tensor], Tensor]
Input = Literal["zero", "fft", "analytic", "pairs"]
Head = Literal["magnitude", "real"]


class ComplexFunctions(TorchFunctionMode):
    """While active, functions that PyTorch has for real tensors only do their complex form on complex ones.

    activation: what every activation becomes; None for itself on both parts (ReLU becomes CReLU).
    Raises BadInput where a function has no complex form.
    """

    def __init__(self, activation: Activation | None = None):
        super().__init__()
        self.activation = activation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        z = args[0] if args else kwargs.get("input")
        if not (isinstance(z, Tensor) and z.is_complex()):
            return func(*args, **kwargs)
        rest = args[1:]
        if name in ACTIVATIONS:
            if self.activation is not None:
                return self.activation(z)
            kwargs.pop("inplace", None)
            function = F.relu if name == "relu_" else func
            return torch.complex(function(z.real, *rest, **kwargs), function(z.imag, *rest, **kwargs))
        if name in BY_PARTS:
            return torch.complex(func(z.real, *rest, **kwargs), func(z.imag, *rest, **kwargs))
        if name in DROPOUTS:
            kwargs.pop("inplace", None)
            return z * func(torch.ones_like(z.real), *rest, **kwargs)
        if name in ("softmax", "log_softmax"):
            return func(magnitude(z), *rest, **kwargs)
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not REAL_ONLY.search(str(error)):
                raise
            raise BadInput(
                f"{name.strip('_')} has no complex form; `to_complex` is for convolutional networks, so take one "
                "without it"
            ) from error


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it computes what `kind` does."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def complex_layer(module: nn.Module) -> nn.Module | None:
    """The complex form of a layer with parameters, freshly initialised; None where there is none."""
    kind = next((k for k in CONVOLUTIONS if _plain(module, k)), None)
    if kind is not None:
        options = {name: getattr(module, name) for name in GEOMETRY} | {"bias": module.bias is not None}
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            options["output_padding"] = module.output_padding
        return CONVOLUTIONS[kind](**options)
    if _plain(module, nn.Linear):
        return linear.ComplexLinear(module.in_features, module.out_features, module.bias is not None)
    if isinstance(module, nn.SyncBatchNorm) or _plain(module, nn.modules.batchnorm._BatchNorm):
        momentum = 0.1 if module.momentum is None else module.momentum
        return ComplexBatchNorm(
            module.num_features, module.eps, momentum, affine=module.affine,
            track_running_stats=module.track_running_stats,
        )  # fmt: skip
    for real, ours in ((LayerNorm2d, ComplexLayerNorm2d), (nn.LayerNorm, ComplexLayerNorm)):
        if _plain(module, real):
            return ours(module.normalized_shape, module.eps, module.elementwise_affine, module.bias is not None)
    if _plain(module, nn.GroupNorm):
        return ComplexGroupNorm(module.num_groups, module.num_channels, module.eps, module.affine)
    return None


def _required(module: nn.Module) -> nn.Module | None:
    """Its complex form, or None to look inside. Raises BadInput where a layer that needs one has none."""
    layer, leaf = complex_layer(module), next(module.children(), None) is None
    if isinstance(module, NO_FORM) or (layer is None and leaf and next(module.parameters(), None) is not None):
        raise BadInput(
            f"{type(module).__name__}({module.extra_repr()}) has no complex form; replace it by convolutions, linear "
            "layers or batch, layer or group norms first"
        )
    return layer


def as_complex(x: Float[Tensor, "n c h w"], how: Input) -> Tensor:
    """A real image as a complex one.

    "zero": imaginary part 0. "fft": its unitary Fourier transform. "analytic": the analytic signal along the rows,
    without negative frequencies. "pairs": the channels' first half is the real part, the second the imaginary one.
    Half precision becomes single, as in the network's weights.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if how == "pairs":
        return torch.complex(*x.chunk(2, 1))
    if how == "fft":
        return torch.fft.fft2(x, norm="ortho")
    if how == "analytic":
        width = x.shape[-1]
        gain = torch.zeros(width, device=x.device)
        gain[0], gain[1 : (width + 1) // 2] = 1, 2
        if width % 2 == 0:
            gain[width // 2] = 1
        return torch.fft.ifft(torch.fft.fft(x) * gain)
    return torch.complex(x, torch.zeros_like(x))


class ComplexNetwork(nn.Module):
    """A network with complex weights between a real or complex input and a real output.

    Args: see `to_complex`, which makes one. Complex inputs pass as they are.
    """

    def __init__(self, model: nn.Module, input: Input, head: Head, activation: Activation | None):
        super().__init__()
        self.model, self.input, self.head = model, input, head
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        with ComplexFunctions(self.activation):
            z = self.model(x if x.is_complex() else as_complex(x, self.input))
        if not z.is_complex():  # probabilities are real
            return z
        return magnitude(z) if self.head == "magnitude" else z.real


def to_complex(
    model: nn.Module, input: Input = "zero", head: Head = "magnitude", activation: Activation | None = None
) -> ComplexNetwork:
    """A complex network of the same convolutional architecture, with fresh weights; the original is left alone.

    The weights are where the original's are, in complex128 for float64 and else in complex64.

    Args:
        input: how real inputs become complex, see `as_complex`. With "pairs" build the model for half of the channels.
        head: the output's magnitude, or its real part.
        activation: a complex activation (`ModReLU(...)`, `torch.tanh`) for every real one;
            None for the same one on both parts.
    Raises BadInput where a layer has no complex form; of functions without one (attention) the first call says so.
    """
    return ComplexNetwork(with_layers_replaced(model, _required)[0], input, head, activation)


def real_parameters(model: nn.Module) -> int:
    """Parameters, where a complex one counts as two."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in model.parameters())


def comparison_triple(
    build: Callable[[int], nn.Module], width: int, input: Input = "zero", head: Head = "magnitude",
    activation: Activation | None = None, real_build: Callable[[int], nn.Module] | None = None, tolerance: float = 0.02,
) -> tuple[nn.Module, nn.Module, ComplexNetwork]:  # fmt: skip
    """CNN, CNNx2 and complex CNN: the networks of the paper's study.

    build: a network of some width. The complex one is `build(width)` converted, the CNN is the real one of this width,
        and CNNx2 the real one of the width whose parameters come nearest to the complex one's.
    real_build: builds the real ones, where their input differs (both parts as channels).
    Raises BadInput where no width comes within `tolerance` of the complex network's parameters.
    """
    real_build = real_build or build
    ours = to_complex(build(width), input, head, activation)
    goal = real_parameters(ours)
    with torch.device("meta"):
        nearest = min(range(width, 3 * width + 1), key=lambda w: abs(real_parameters(real_build(w)) - goal))
    doubled = real_build(nearest)
    miss = abs(real_parameters(doubled) / goal - 1)
    if miss > tolerance:
        raise BadInput(
            f"no width between {width} and {3 * width} matches the complex network's {goal} parameters (the nearest "
            f"is {100 * miss:.1f} % off); start from a larger width"
        )
    return real_build(width), doubled, ours
