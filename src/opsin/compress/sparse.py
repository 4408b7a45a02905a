"""Pruned layers as they are stored: the weights that are left, and one bit for each place."""

from math import prod

import torch
from torch import Tensor, nn

from opsin.compress.quantiser import PackedLayer, pack_codes, unpack_codes, weight_of


class SparseLayer(PackedLayer):
    """A convolution or linear layer whose zeros are not stored. It saves memory, not time."""

    places: Tensor

    def __init__(self, layer: nn.Module, mask: Tensor):
        super().__init__(layer)
        self.values = nn.Parameter(weight_of(layer).detach()[mask.bool()].clone())
        self.register_buffer("places", pack_codes(mask.flatten().to(torch.int32), 1))

    def weight(self) -> Tensor:
        """With the zeros."""
        places = unpack_codes(self.places, 1)[: prod(self.shape)].bool()
        return torch.zeros_like(places, dtype=self.values.dtype).masked_scatter(places, self.values).view(self.shape)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.shape}, {len(self.values)} weights left"


def place_bytes(weight: Tensor) -> int:
    """Bytes for one bit per weight of a layer."""
    return -(-weight.numel() // 8)
