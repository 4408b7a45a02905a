"""A gain and an offset per channel: what a norm with fixed statistics is at inference."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def channel_affine(
    x: Float[Tensor, "n ..."], gain: Float[Tensor, " c"], offset: Float[Tensor, " c"], channels_last: bool = False
) -> Float[Tensor, "n ..."]:
    """gain * x + offset; channels are axis 1 of a map (N, C, H, W) and the last axis of anything else.

    channels_last: the last axis of maps too.
    """
    gain, offset = gain.to(x.dtype), offset.to(x.dtype)
    if x.ndim == 4 and not channels_last:
        return x * gain[:, None, None] + offset[:, None, None]  # addcmul is slow where it has to repeat like this
    return torch.addcmul(offset, x, gain)


class ChannelAffine(nn.Module):
    """`channel_affine` as a module; `fold_into(layer)` is the Linear or 1x1 convolution that has swallowed it."""

    def __init__(self, gain: Float[Tensor, " c"], offset: Float[Tensor, " c"], channels_last: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(gain.detach().clone()), nn.Parameter(offset.detach().clone())
        self.channels_last = channels_last

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        return channel_affine(x, self.weight, self.bias, self.channels_last)

    @torch.no_grad()
    def fold_into(self, layer: Any) -> nn.Module | None:
        """W diag(gain) and bias + W offset, or None where the layer is no plain Linear or unpadded 1x1 convolution."""
        if type(layer) is nn.Conv2d and not self.channels_last:
            if layer.kernel_size != (1, 1) or layer.padding not in ((0, 0), "valid", "same"):
                return None
            into = layer.groups, -1  # inputs of a group stand in axis 1, outputs of all groups in axis 0
            weight = layer.weight.flatten(1).unflatten(0, into)
            gain, offset = (p.view(layer.groups, 1, -1).to(weight.dtype) for p in (self.weight, self.bias))
        elif type(layer) is nn.Linear and layer.in_features == len(self.weight):
            weight, gain, offset = layer.weight, self.weight.to(layer.weight.dtype), self.bias.to(layer.weight.dtype)
        else:
            return None
        folded = copy.deepcopy(layer)
        folded.weight = nn.Parameter((weight * gain).reshape(layer.weight.shape))
        bias = (weight * offset).sum(-1).flatten()
        folded.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias)
        return folded
