"""Spatial operators: `Op(dim, **options)` maps (N, C, H, W) to (N, C', H', W').

An operator whose card says `mixer = true` keeps the shape, so `MetaNet` takes it by name. One whose weights depend on
the resolution says `fixed_size = true` under the card's `[facts]`, and is built with `input_size=(height, width)`.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class Op(Protocol):
    """The contract of the room.

    Every member is an `nn.Module`; in eval mode the samples of a batch do not influence each other. Where the fast path
    is not the definition itself, `reference(x)` in the same class is the definition, short and readable.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]: ...
    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]: ...
