"""A gain and an offset per channel: what a norm with fixed statistics is at inference."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ChannelAffine(nn.Module):
    """gain * x + offset on the channels, which are axis 1 of a map (N, C, H, W) and the last axis of anything else.

    channels_last: the last axis of maps too. `fold_into(layer)` is the Linear or 1x1 convolution that has swallowed it.
    """

    def __init__(self, gain: Float[Tensor, " c"], offset: Float[Tensor, " c"], channels_last: bool = False):
        super().__init__()
        self.weight, self.bias = nn.Parameter(gain.detach().clone()), nn.Parameter(offset.detach().clone())
        self.channels_last = channels_last

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        gain, offset = (self.on_channels(p, x).to(x.dtype) for p in (self.weight, self.bias))
        return torch.addcmul(offset, x, gain)

    def on_channels(self, vector: Float[Tensor, " c"], x: Float[Tensor, "n ..."]) -> Tensor:
        return vector[:, None, None] if x.ndim == 4 and not self.channels_last else vector

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
