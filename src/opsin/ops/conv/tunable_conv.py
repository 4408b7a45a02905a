"""Tunable convolution: a bank of kernels mixed by numbers that the user turns; one network, many behaviours.

Maggioni et al. 2023, "Tunable Convolutions with Parametric Multi-Loss Optimization", arXiv:2304.00898. A control w in
[0, 1]^p, one number per objective, drives every layer and, in training, the loss (`opsin.restore.multi_loss`):

    a = phi(w),    k = sum_i a_i k_i,   b = sum_i a_i b_i,    y = x * k + b

As convolution is linear this is sum_i a_i (x * k_i + b_i), at the cost of one convolution: the kernels are summed
first, which takes p C' C k^2 multiplications whatever the size of the image. With w held fixed it folds into a plain
convolution. CondConv and dynamic convolutions compute a from the features; here it comes from outside.

phi is a small MLP of the layer's own, an affine map, or the identity. (The authors' code in mindspore-lab/mindediting
calls an affine map with weights near zero "mlp", which makes all outputs about zero at first; here a starts near 1/K
for K kernels, and fresh kernels are K^(1/2) larger, so that the mixed kernel has the variance of a plain one.)
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput, UnknownName
from opsin.layers.replace import with_layers_replaced

PHI = ("mlp", "affine", "identity")
SPREAD = 0.5  # of the coefficients at first, relative to their mean, over controls in the unit cube


def coefficient_map(phi: str, controls: int, kernels: int, hidden: int) -> nn.Module:
    """phi: (n, p) controls -> (n, K) coefficients, near 1/K at first. Raises UnknownName, or BadInput (identity)."""
    if phi not in PHI:
        raise UnknownName("map of the controls", phi, PHI)
    if phi == "identity":
        if kernels != controls:
            raise BadInput(f"phi='identity' needs one kernel per control, not {kernels} for {controls}; take 'affine'")
        return nn.Identity()
    last = nn.Linear(controls if phi == "affine" else hidden, kernels)
    nn.init.normal_(last.weight, std=SPREAD / kernels / math.sqrt(last.in_features))
    nn.init.constant_(last.bias, 1 / kernels)
    return last if phi == "affine" else nn.Sequential(nn.Linear(controls, hidden), nn.GELU(), last)


class Tunable(nn.Module):
    """What tunable layers share: K weights and biases, phi, and the control in force.

    `control` is (p,), one setting for all samples, or (n, p), one per sample; `set_control` sets it for a whole
    network. It is an input and not part of the state; at first it is all ones.
    """

    control: Tensor

    def __init__(self, shape: tuple[int, ...], bias: bool, controls: int, kernels: int | None, phi: str, hidden: int):
        super().__init__()
        if controls < 1:
            raise BadInput(f"controls={controls} leaves nothing to turn; take 1 or more")
        self.controls, self.kernels = controls, kernels or controls
        bound = math.sqrt(self.kernels / math.prod(shape[1:]))  # K times the variance of torch's own layers
        self.weight = nn.Parameter(torch.empty(self.kernels, *shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(self.kernels, shape[0]).uniform_(-bound, bound)) if bias else None
        self.phi = coefficient_map(phi, controls, self.kernels, hidden)
        self.register_buffer("control", torch.ones(controls), persistent=False)

    def mixed(self, control: Float[Tensor, "n p"]) -> tuple[Float[Tensor, "n o *k"], Float[Tensor, "n o"] | None]:
        """The kernel and bias of each row of controls."""
        a = self.phi(control)
        weight = (a @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
        return weight, None if self.bias is None else a @ self.bias

    def rows(self, x: Tensor, control: Tensor | None) -> Float[Tensor, "m p"]:
        """The controls as one row, or one row per sample. Raises BadInput where they do not fit."""
        w = self.control if control is None else control.to(self.weight)
        if w.shape[-1] != self.controls or w.ndim > 2 or (w.ndim == 2 and len(w) != len(x)):
            raise BadInput(
                f"a control of shape {tuple(w.shape)} does not fit; take ({self.controls},) for all samples or "
                f"({len(x)}, {self.controls}) for each"
            )
        return w if w.ndim == 2 else w[None]

    def adopt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Starts from an existing layer: kernels that differ, and whose mean is the given one.

        Where the coefficients are all 1/K, the layer is the existing one.
        """
        with torch.no_grad():
            for bank, given in ((self.weight, weight), (self.bias, bias)):
                if bank is not None and given is not None:
                    deviation = bank - bank.mean(0)
                    bank.copy_(
                        given + deviation * (given.std(correction=0) / deviation.std(correction=0).clamp_min(1e-12))
                    )

    def _folded(self) -> tuple[Tensor, Tensor | None]:
        if self.control.ndim != 1:
            raise BadInput(
                "the control differs between samples, so there is no one layer to fold into; set one for all"
            )
        with torch.no_grad():
            weight, bias = self.mixed(self.control[None])
        return weight[0], None if bias is None else bias[0]


class TunableConv2d(Tunable):
    """(N, C, H, W) -> (N, C', H', W'), a drop-in for nn.Conv2d.

    Args:
        controls, kernels: p, and K of the bank (p by default).
        phi: "mlp" with `hidden` units, "affine" or "identity" (a = w).
    forward(x, control): the control of this call, (p,) or (n, p), instead of the one in force.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1, padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1, groups: int = 1, bias: bool = True, controls: int = 2,
        kernels: int | None = None, phi: str = "mlp", hidden: int = 16,
    ):  # fmt: skip
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        super().__init__((out_channels, in_channels // groups, *sides), bias, controls, kernels, phi, hidden)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(
        self, x: Float[Tensor, "n c h w"], control: Float[Tensor, "*m p"] | None = None
    ) -> Float[Tensor, "n o h2 w2"]:
        rows = self.rows(x, control)
        weight, bias = self.mixed(rows)
        if (self.control if control is None else control).ndim == 1:
            return self._conv(x, weight[0], None if bias is None else bias[0], self.groups)
        grouped, samples = x.reshape(1, -1, *x.shape[2:]), len(x)  # one convolution with a group per sample
        y = self._conv(grouped, weight.flatten(0, 1), None if bias is None else bias.flatten(), samples * self.groups)
        return y.unflatten(1, (samples, -1))[0]

    def reference(
        self, x: Float[Tensor, "n c h w"], control: Float[Tensor, "*m p"] | None = None
    ) -> Float[Tensor, "n o h2 w2"]:
        """The definition: K convolutions, their outputs mixed."""
        a = self.phi(self.rows(x, control))
        biases = [None] * self.kernels if self.bias is None else self.bias
        maps = [self._conv(x, k, b, self.groups) for k, b in zip(self.weight, biases, strict=True)]
        return sum(a[:, i, None, None, None] * y for i, y in enumerate(maps))

    def _conv(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def fuse(self) -> nn.Conv2d:
        """The plain convolution at the control in force. Raises BadInput where that differs between samples."""
        weight, bias = self._folded()
        out, inputs, *sides = weight.shape
        conv = nn.Conv2d(
            inputs * self.groups, out, tuple(sides), self.stride, self.padding, self.dilation, self.groups,
            bias is not None, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        conv.weight.data.copy_(weight)
        if bias is not None:
            conv.bias.data.copy_(bias)
        return conv

    def extra_repr(self) -> str:
        _, out, inputs, *sides = self.weight.shape
        return f"{inputs * self.groups}, {out}, {tuple(sides)}, controls={self.controls}, kernels={self.kernels}"


class TunableLinear(Tunable):
    """The same rule for a linear layer: (n, ..., c) -> (n, ..., d)."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, controls: int = 2, kernels: int | None = None,
        phi: str = "mlp", hidden: int = 16,
    ):  # fmt: skip
        super().__init__((out_features, in_features), bias, controls, kernels, phi, hidden)

    def forward(self, x: Float[Tensor, "n *m c"], control: Float[Tensor, "*k p"] | None = None) -> Tensor:
        weight, bias = self.mixed(self.rows(x, control))
        y = (x.flatten(1, -2) if x.ndim > 2 else x[:, None]) @ weight.mT
        return (y if bias is None else y + bias[:, None]).reshape(*x.shape[:-1], -1)

    def fuse(self) -> nn.Linear:
        """The plain layer at the control in force. Raises BadInput where that differs between samples."""
        weight, bias = self._folded()
        linear = nn.Linear(*weight.shape[::-1], bias is not None, device=weight.device, dtype=weight.dtype)
        linear.weight.data.copy_(weight)
        if bias is not None:
            linear.bias.data.copy_(bias)
        return linear


class TunableConv(TunableConv2d):
    """The operator: (N, C, H, W) -> the same at stride 1, 'same' zero padding. Raises BadInput for an even kernel."""

    def __init__(
        self, dim: int, controls: int = 2, kernel_size: int = 3, phi: str = "mlp", hidden: int = 16,
        kernels: int | None = None, stride: int = 1,
    ):  # fmt: skip
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even, so that the map would shift; take an odd one")
        super().__init__(
            dim, dim, kernel_size, stride, kernel_size // 2, controls=controls, kernels=kernels, phi=phi, hidden=hidden
        )


def make_tunable(
    model: nn.Module, controls: int = 2, kernels: int | None = None, phi: str = "mlp", linear: bool = False
) -> nn.Module:
    """A copy of a network in which every Conv2d is tunable (and every Linear, if asked), started from its weights.

    `set_control(net, w)` or `with controlled(net, w)` turns them all. Convolutions whose padding is not with zeros
    stay. Raises BadInput: nothing to replace.
    """
    kinds = (nn.Conv2d, nn.Linear) if linear else (nn.Conv2d,)

    def swap(layer: nn.Module) -> nn.Module | None:
        plain = type(layer) in kinds and getattr(layer, "padding_mode", "zeros") == "zeros"
        return _tunable(layer, controls, kernels, phi) if plain else None

    new, count = with_layers_replaced(model, swap)
    if not count:
        raise BadInput(f"{type(model).__name__} has no convolution that could be made tunable")
    return new


def _tunable(layer: nn.Module, controls: int, kernels: int | None, phi: str) -> Tunable:
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    bias = layer.bias is not None
    new: Tunable
    if isinstance(layer, nn.Linear):
        new = TunableLinear(layer.in_features, layer.out_features, bias, controls, kernels, phi)
    else:
        new = TunableConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias, controls, kernels, phi,
        )  # fmt: skip
    new.to(layer.weight)
    new.adopt(layer.weight, layer.bias)
    return new.train(layer.training)


def set_control(model: nn.Module, control: Tensor | list[float]) -> None:
    """Turns every tunable layer of a network to one control: (p,), or (n, p) for the next batch of n.

    Raises BadInput: no tunable layer, or another number of controls.
    """
    layers = [m for m in model.modules() if isinstance(m, Tunable)]
    if not layers:
        raise BadInput(f"{type(model).__name__} has no tunable layer; make_tunable(model) gives it some")
    for layer in layers:
        w = torch.as_tensor(control).to(layer.weight)
        if w.ndim not in (1, 2) or w.shape[-1] != layer.controls:
            raise BadInput(f"a control of shape {tuple(w.shape)} does not fit layers with {layer.controls} controls")
        layer.control = w


@contextmanager
def controlled(model: nn.Module, control: Tensor | list[float]) -> Iterator[nn.Module]:
    """`set_control` for a while; afterwards every layer is as before."""
    before = [(m, m.control) for m in model.modules() if isinstance(m, Tunable)]
    try:
        set_control(model, control)
        yield model
    finally:
        for layer, old in before:
            layer.control = old
