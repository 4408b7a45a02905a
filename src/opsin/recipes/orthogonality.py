"""Orthogonality: the loss of any network plus lambda times the sum of L(K) over its convolutions.

The regulariser of Achour, Malgouyres and Mamalet 2022 (arXiv:2108.05623; see the operator `orthogonal_conv`), which
depends on the kernels only. Convolutions with groups or dilation, those that no orthogonal kernel exists for, and those
with a kernel below `min_kernel_size` are left alone.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.ops.conv.orthogonal_conv import OrthogonalConv
from opsin.ops.conv.orthogonality import existence, orthogonality_loss
from opsin.recipes.penalty import Penalty

Convolution = nn.Conv1d | nn.Conv2d | OrthogonalConv


def can_be_orthogonal(layer: nn.Module) -> bool:
    """Whether it is a dense convolution with one stride, for whose sizes orthogonal kernels exist."""
    if isinstance(layer, OrthogonalConv):
        return existence(*layer.weight.shape[:3], layer.stride).exists
    if not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.groups > 1 or set(layer.dilation) != {1}:
        return False
    square = len(set(layer.stride)) == len(set(layer.kernel_size)) == 1
    return square and existence(*layer.weight.shape[:3], layer.stride[0], layer.weight.ndim - 2).exists


def stride_of(layer: Convolution) -> int:
    return layer.stride if isinstance(layer.stride, int) else layer.stride[0]


class Orthogonality(Penalty):
    """Adds weight * sum of L(K) to what is minimised.

    Args: weight, the paper's lambda, which trades accuracy for robustness; min_kernel_size in taps, 2 to leave the
        1 x 1 convolutions free. Raises BadInput for a negative weight, and at the start of training where the network
        has no convolution that could be orthogonal.
    """

    def __init__(self, weight: float = 0.1, min_kernel_size: int = 1):
        super().__init__(weight)
        self.min_kernel_size = min_kernel_size

    def layers(self, model: nn.Module) -> Iterator[Convolution]:
        """The trained convolutions that are regularised."""
        for layer in model.modules():
            if (
                can_be_orthogonal(layer)
                and layer.weight.requires_grad
                and layer.weight.shape[-1] >= self.min_kernel_size
            ):
                yield layer

    def penalty(self, model: nn.Module) -> Float[Tensor, ""]:
        """The sum of L(K). Raises BadInput where there is nothing to sum."""
        losses = [orthogonality_loss(layer.weight, stride_of(layer)) for layer in self.layers(model)]
        if not losses:
            raise BadInput(f"{type(model).__name__} has no convolution that could be orthogonal")
        return torch.stack(losses).sum()
