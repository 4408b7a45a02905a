"""Pruned layers as they are stored: the weights that are left, and one bit for each place."""

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.compress.quantiser import CONVOLUTIONS, pack_codes, unpack_codes, weight_of


class SparseLayer(nn.Module):
    """A convolution or linear layer whose zeros are not stored. It saves memory, not time: weights unpack when used."""

    places: Tensor

    def __init__(self, layer: nn.Module, mask: Tensor):
        super().__init__()
        weight = weight_of(layer).detach()
        self.shape, self.kind = tuple(weight.shape), type(layer).__name__
        self.values = nn.Parameter(weight[mask.bool()].clone())
        self.register_buffer("places", pack_codes(mask.flatten().to(torch.int32), 1))
        bias = layer.bias
        self.bias = nn.Parameter(bias.detach().clone()) if isinstance(bias, Tensor) else None
        self.compute: Callable[..., Tensor] = F.linear
        if not isinstance(layer, nn.Linear):
            function = next(f for kind, f in CONVOLUTIONS.items() if isinstance(layer, kind))
            geometry = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
            self.compute = partial(function, **geometry)

    def weight(self) -> Tensor:
        """With the zeros."""
        places = unpack_codes(self.places, 1)[: prod(self.shape)].bool()
        return torch.zeros_like(places, dtype=self.values.dtype).masked_scatter(places, self.values).view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.shape}, {len(self.values)} weights left"


def place_bytes(weight: Tensor) -> int:
    """Bytes for one bit per weight of a layer."""
    return -(-weight.numel() // 8)
