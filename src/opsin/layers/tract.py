"""TrAct: the weight update that best realises a gradient step on a layer's outputs.

Petersen et al. 2024, "TrAct: Making First-layer Pre-Activations Trainable", arXiv:2410.23970. A gradient step on the
weights of a first layer is proportional to the pixels, so bright and contrasty images train it more. Take the step on
the outputs z = W x instead, z* = z - eta dL/dz, and then the W that comes nearest to it: least squares over the b rows
of X, with a penalty lambda on the change (eq. 4-6). With the ordinary gradient G^T X the solution is

    G^T X (X^T X / b + lambda I)^-1  =  (G^T X - G^T X X^T (X X^T + lambda b I)^-1 X) / lambda

of which the left side solves n equations and the right side (Woodbury) b, so the smaller is taken. Of a convolution
the rows are the patches, b = images x positions; each group is a problem of its own. Gradients of the input and of the
bias stay, and nothing changes at inference.
"""

from collections.abc import Iterator
from contextlib import suppress
from math import prod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from opsin.errors import BadInput

LAMBDA = 0.1
CHUNK = 2**22  # numbers in the patches that are in memory at a time
NO_LAYER = "TrAct needs a linear layer or a convolution, and this network has none"
Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


def least_squares(
    grad: Float[Tensor, "g m n"], rows: Float[Tensor, "g b n"], lam: float = LAMBDA
) -> Float[Tensor, "g m n"]:
    """The ordinary gradient G^T X to the one that realises the step on the outputs; by the smaller of both systems."""
    count, dim = rows.shape[1:]
    if count >= dim:
        return by_covariance(grad, rows.mT @ rows / count, lam)
    return by_woodbury(grad, rows, lam)


def by_covariance(grad: Float[Tensor, "g m n"], covariance: Float[Tensor, "g n n"], lam: float) -> Tensor:
    """The left side: n equations."""
    damped = covariance + lam * torch.eye(covariance.shape[1]).to(covariance)
    return torch.cholesky_solve(grad.mT, torch.linalg.cholesky(damped)).mT


def by_woodbury(grad: Float[Tensor, "g m n"], rows: Float[Tensor, "g b n"], lam: float) -> Tensor:
    """The right side: b equations."""
    count = rows.shape[1]
    damped = rows @ rows.mT + lam * count * torch.eye(count).to(rows)
    return (grad - torch.cholesky_solve(rows @ grad.mT, torch.linalg.cholesky(damped)).mT @ rows) / lam


def realised(layer: Layer, grad: Tensor, inputs: list[Tensor], lam: float) -> Tensor:
    """The gradient of a layer's weight to TrAct's, given what the layer was applied to. Computed in float32 or more."""
    groups = getattr(layer, "groups", 1)
    flat = grad.flatten(1).unflatten(0, (groups, -1))
    flat = flat.to(torch.promote_types(grad.dtype, torch.float32))
    count = sum(rows_of(layer, x) for x in inputs)
    if count == 0:
        return grad
    parts = (rows(layer, part).to(flat) for x in inputs for part in _parts(layer, x))
    if count < flat.shape[2]:
        new = by_woodbury(flat, torch.cat(list(parts), 1), lam)
    else:
        new = by_covariance(flat, sum(part.mT @ part for part in parts) / count, lam)
    return new.reshape(grad.shape).to(grad.dtype)


def rows(layer: Layer, x: Tensor) -> Float[Tensor, "g b n"]:
    """What each output of the layer is computed from: inputs of a linear layer, patches of a convolution."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    axes = len(layer.kernel_size)
    x = x if x.ndim == axes + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for i, (k, s, d) in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation)):
        x = x.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, 2 + axes)  # n, g, *positions, channels of the group, *kernel
    return x.movedim(1, 0).flatten(-axes - 1).flatten(1, -2)


def rows_of(layer: Layer, x: Tensor) -> int:
    """How many rows an input has."""
    if isinstance(layer, nn.Linear):
        return x.numel() // x.shape[-1]
    return rows(layer, x.detach().to("meta")).shape[1]


def _parts(layer: Layer, x: Tensor) -> tuple[Tensor, ...]:
    """The input in parts whose patches fit into CHUNK numbers."""
    if isinstance(layer, nn.Linear):
        return (x,)
    x = x if x.ndim == len(layer.kernel_size) + 2 else x[None]
    each = rows_of(layer, x[:1]) * layer.in_channels * prod(layer.kernel_size)
    return x.split(max(1, CHUNK // each))


class _Realise(torch.autograd.Function):
    """The weight itself; in backward, its gradient becomes TrAct's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, layer: Layer, lam: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.lam = layer, lam
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        return realised(ctx.layer, grad, [x], ctx.lam), None, None, None


def _weight(layer: Any, x: Tensor) -> Tensor:
    return _Realise.apply(layer.weight, x.detach(), layer, layer.lam) if layer.training else layer.weight


class TrActLinear(nn.Linear):
    """`nn.Linear` whose weight learns by TrAct; `lam` is set after construction (0.1)."""

    lam = LAMBDA

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... c2"]:
        return F.linear(x, _weight(self, x), self.bias)


class TrActConv1d(nn.Conv1d):
    """`nn.Conv1d` whose weight learns by TrAct."""

    lam = LAMBDA

    def forward(self, x: Float[Tensor, "n c l"]) -> Float[Tensor, "n c2 l2"]:
        return self._conv_forward(x, _weight(self, x), self.bias)


class TrActConv2d(nn.Conv2d):
    """`nn.Conv2d` whose weight learns by TrAct."""

    lam = LAMBDA

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        return self._conv_forward(x, _weight(self, x), self.bias)


class TrActConv3d(nn.Conv3d):
    """`nn.Conv3d` whose weight learns by TrAct."""

    lam = LAMBDA

    def forward(self, x: Float[Tensor, "n c d h w"]) -> Float[Tensor, "n c2 d2 h2 w2"]:
        return self._conv_forward(x, _weight(self, x), self.bias)


WRAPPERS = {nn.Linear: TrActLinear, nn.Conv1d: TrActConv1d, nn.Conv2d: TrActConv2d, nn.Conv3d: TrActConv3d}


def tract(layer: nn.Module, lam: float = LAMBDA) -> nn.Module:
    """A drop-in layer with the same parameters and names: `net.conv1 = tract(net.conv1)`.

    Raises BadInput for layers other than linear ones and convolutions, for those whose forward or weight is not the
    usual one, and lambda <= 0.
    """
    _check(layer, lam)
    kind = next(kind for kind in WRAPPERS if isinstance(layer, kind))
    if "forward" in vars(layer) or not _computes_as(type(layer), (kind, WRAPPERS[kind])):
        raise BadInput(
            f"{type(layer).__name__} has a forward of its own, which tract() would replace; keep the layer and take "
            "TrActHook or the recipe tract"
        )
    new = WRAPPERS[kind].__new__(WRAPPERS[kind])
    new.__dict__.update(layer.__dict__)
    new._parameters = dict(layer._parameters)
    new.lam = lam
    return new


def _check(layer: nn.Module, lam: float) -> None:
    if not isinstance(layer, tuple(WRAPPERS)):
        raise BadInput(f"TrAct is for a linear layer or a 1-D to 3-D convolution, not for {type(layer).__name__}")
    if "weight" not in layer._parameters:
        raise BadInput(
            f"the weight of this {type(layer).__name__} is computed from other tensors (weight_norm, pruning, ...), "
            "but TrAct needs a parameter; take the reparametrisation off first"
        )
    _check_positive(lam)


def _computes_as(kind: type, others: tuple[type, ...]) -> bool:
    """Whether a class of layers computes what one of the others computes."""
    names = ("forward", "_conv_forward")
    return any(all(getattr(kind, n, None) is getattr(other, n, None) for n in names) for other in others)


def _check_positive(lam: float) -> None:
    if lam <= 0:
        raise BadInput(f"lambda must be above 0 (0.05 to 0.2 works), not {lam}")


class TrActHook:
    """TrAct on an existing layer: no module is replaced and no name changes. `remove()` ends it.

    Raises BadInput for layers other than linear ones and convolutions, a weight that is frozen or computed from other
    tensors, and lambda <= 0.
    """

    def __init__(self, layer: nn.Module, lam: float = LAMBDA):
        _check(layer, lam)
        if not layer.weight.requires_grad:
            raise BadInput(
                f"the weight of this {type(layer).__name__} is frozen, and TrAct changes how it learns; "
                "leave TrAct out, or let the weight have gradients"
            )
        self.layer, self.lam = layer, lam
        self.inputs: list[Tensor] = []
        self.backward = -1
        self.handles = [layer.register_forward_hook(self.see), layer.weight.register_hook(self.change)]

    def see(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Has the input noted when a gradient comes back to the output; until then the graph alone holds it."""
        if layer.training and output.requires_grad:
            x = args[0].detach()
            output.register_hook(lambda grad: self.note(x))

    def note(self, x: Tensor) -> None:
        """Keeps what the layer was applied to in the backward pass that runs now."""
        if self.backward != torch._C._current_graph_task_id():
            self.backward, self.inputs = torch._C._current_graph_task_id(), []
        self.inputs.append(x)

    def change(self, grad: Tensor) -> Tensor:
        inputs, self.inputs = self.inputs, []
        here = self.backward == torch._C._current_graph_task_id()
        return realised(self.layer, grad, inputs, self.lam) if here and inputs else grad

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.inputs = [], []


class FirstLayerHook:
    """TrAct on whichever layer of a network is the first to be applied, found in its next forward pass.

    Raises BadInput where the network has no linear layer and no convolution; that forward pass raises it where the
    layer found is none for a `TrActHook`.
    """

    def __init__(self, network: nn.Module, lam: float = LAMBDA):
        _check_positive(lam)
        self.lam = lam
        self.hook: TrActHook | None = None
        self.waiting = list(_watch(network, self._found))
        if not self.waiting:
            raise BadInput(NO_LAYER)

    def _found(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.hook is None:
            self._stop()
            self.hook = TrActHook(layer, self.lam)

    def _stop(self) -> None:
        for handle in self.waiting:
            handle.remove()
        self.waiting = []

    def remove(self) -> None:
        self._stop()
        if self.hook is not None:
            self.hook.remove()
        self.hook = None


def _watch(network: nn.Module, call: Any) -> Iterator[RemovableHandle]:
    for module in network.modules():
        if isinstance(module, tuple(WRAPPERS)):
            yield module.register_forward_pre_hook(call)


def first_layer(network: nn.Module, example: Tensor) -> str:
    """The name of the linear layer or convolution that is applied first. Raises BadInput where there is none."""

    class Stop(Exception):
        pass

    found: list[nn.Module] = []

    def call(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(layer)
        raise Stop

    handles = list(_watch(network, call))
    try:
        with suppress(Stop), torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise BadInput(NO_LAYER)
    return next(name for name, module in network.named_modules() if module is found[0])
