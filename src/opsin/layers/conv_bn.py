"""A convolution and the batch norm behind it as one convolution whose weights are folded at every call.

You et al. 2023, "Efficient ConvBN Blocks for Transfer Learning and Beyond", arXiv:2305.11624. With the running
statistics m and v, a batch norm is an affine map of the convolution's output, and a convolution is linear in its
weight:

    BN(w * x + b) = (s w) * x + (beta + s (b - m)),    s = gamma / sqrt(v + eps)

Computed from the right, autograd reaches w, b, gamma and beta through s w, so the gradients are those of the left side,
but nothing of the size of the map is kept between convolution and batch norm.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.layers.readers import quiet, sole_readers

CONVS: dict[type, Any] = {
    nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d, nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d, nn.ConvTranspose3d: F.conv_transpose3d,
}  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OVERRIDES = ("forward", "_conv_forward", "_output_padding")  # what a convolution computes


def fold(conv: Any, norm: Any) -> tuple[Float[Tensor, "..."], Float[Tensor, " c"]]:
    """Weight and bias of the one convolution, differentiable in all parameters of the two.

    A transposed convolution keeps its output channels in axis 1 of the weight, one run of them per group.
    """
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else norm.weight * scale
    shift = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
    bias = scale * shift if norm.bias is None else torch.addcmul(norm.bias, scale, shift)
    weight, scale = conv.weight, scale.to(conv.weight.dtype)
    taps = [1] * (weight.ndim - 2)
    if conv.transposed:
        grouped = weight.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, *taps)
        return grouped.flatten(0, 1), bias.to(weight.dtype)
    return weight * scale.view(-1, 1, *taps), bias.to(weight.dtype)


class FoldedConv:
    """The forward of a convolution that does its batch norm's work too, as long as that is in eval mode."""

    def __init__(self, conv: nn.Module, norm: nn.Module):
        self.conv, self.norm = conv, norm

    def __call__(self, x: Float[Tensor, "n c ..."], output_size: list[int] | None = None) -> Float[Tensor, "n c2 ..."]:
        conv: Any = self.conv
        weight, bias = (conv.weight, conv.bias) if self.norm.training else fold(conv, self.norm)
        if not conv.transposed:
            return conv._conv_forward(x, weight, bias)
        sides = conv._output_padding(
            x, output_size, conv.stride, conv.padding, conv.kernel_size, weight.ndim - 2, conv.dilation
        )
        return _function(conv)(x, weight, bias, conv.stride, conv.padding, sides, conv.groups, conv.dilation)


class PassedNorm:
    """The forward of its batch norm: nothing in eval mode, the usual in training mode."""

    def __init__(self, norm: nn.Module):
        self.norm = norm

    def __call__(self, x: Float[Tensor, "n c ..."]) -> Float[Tensor, "n c ..."]:
        return type(self.norm).forward(self.norm, x) if self.norm.training else x


def _function(conv: nn.Module) -> Any:
    """The function that a convolution calls; None where its class computes something of its own."""
    for base, function in CONVS.items():
        if isinstance(conv, base):
            own = any(getattr(type(conv), name, None) is not getattr(base, name, None) for name in OVERRIDES)
            return None if own or hasattr(conv, "parametrizations") else function
    return None


def _is_conv(module: nn.Module) -> bool:
    return _function(module) is not None and quiet(module)


def _is_norm(module: Any) -> bool:
    return type(module) in NORMS and module.running_mean is not None and quiet(module)


def conv_norm_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) where the norm alone reads the convolution."""
    return sole_readers(model, _is_conv, _is_norm)


def tune(model: nn.Module) -> list[tuple[str, str]]:
    """Folds every pair on the fly from now on, whenever its batch norm is in eval mode. Returns the pairs.

    Parameters, buffers and their names stay as they are; copies and pickles of the model are folded as well.
    """
    pairs = conv_norm_pairs(model)
    for conv_name, norm_name in pairs:
        conv: Any = model.get_submodule(conv_name)
        norm: Any = model.get_submodule(norm_name)
        conv.forward, norm.forward = FoldedConv(conv, norm), PassedNorm(norm)
    return pairs


def untune(model: nn.Module) -> None:
    """Takes back `tune`."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FoldedConv | PassedNorm):
            del module.forward


def fold_once(model: nn.Module) -> list[tuple[str, str]]:
    """Replaces every pair by one convolution whose folded weight is the parameter ("Deploy"), in place."""
    pairs = conv_norm_pairs(model)
    for conv_name, norm_name in pairs:
        conv: Any = model.get_submodule(conv_name)
        weight, bias = fold(conv, model.get_submodule(norm_name))
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        model.set_submodule(norm_name, nn.Identity())
    return pairs
