"""A convolution that can be orthogonal: dense, without bias, with the image continued from its other side.

Achour, Malgouyres and Mamalet 2022, "Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
arXiv:2108.05623. Circular padding is what makes orthogonal kernels exist for practically every layer; with zeros around
the image only 1 x 1 kernels remain, and without padding none that keeps all of a narrower input. The kernel is free;
`penalty()`, the exact regulariser L(K) of `orthogonality.py`, is added to the loss (by the recipe `orthogonality`).
An orthogonal layer keeps norms, hence it neither amplifies a perturbation of the image nor shrinks the gradient.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.ops.conv.orthogonality import (
    Existence,
    Padding,
    existence,
    free_orthogonal_kernel,
    isometry_bounds,
    middle_orthogonal_kernel,
    orthogonality_loss,
    pad,
    singular_values,
)


def glorot_kernel(out_channels: int, in_channels: int, kernel_size: int, stride: int = 1) -> Tensor:
    """Glorot's normal initialisation, which is not orthogonal."""
    return nn.init.xavier_normal_(torch.empty(out_channels, in_channels, kernel_size, kernel_size))


INITS = {"orthogonal": free_orthogonal_kernel, "delta": middle_orthogonal_kernel, "glorot": glorot_kernel}
PADDINGS = ("circular", "zero", "valid")


class OrthogonalConv(nn.Module):
    """(N, dim, H, W) -> (N, out_dim, ceil(H / stride), ceil(W / stride)); smaller with padding="valid".

    Args:
        kernel_size: odd. stride: orthogonality is meant for maps whose sides are multiples of it.
        padding: "circular", or "zero" and "valid", under which the theorem fails.
        init: "orthogonal" (dense taps), "delta" (fewest taps) or "glorot" (not orthogonal).
    Raises BadInput for an unknown padding or init, an even kernel, or an init that does not exist for these sizes.
    """

    def __init__(
        self, dim: int, out_dim: int | None = None, kernel_size: int = 3, stride: int = 1,
        padding: Padding = "circular", init: str = "orthogonal",
    ):  # fmt: skip
        super().__init__()
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; an orthogonal convolution needs an odd one")
        if init not in INITS or padding not in PADDINGS:
            raise BadInput(
                f"init='{init}', padding='{padding}' is unknown; init is one of {', '.join(INITS)}, "
                f"padding one of {', '.join(PADDINGS)}"
            )
        self.stride, self.padding = stride, padding
        kernel = INITS[init](out_dim or dim, dim, kernel_size, stride)
        self.weight = nn.Parameter(kernel.to(torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m h2 w2"]:
        kernel, least = self.weight.shape[-1], self.least_side
        if min(x.shape[2:]) < least:
            raise BadInput(
                f"a map of {x.shape[2]}x{x.shape[3]} is too small for kernel_size={kernel}; use {least} or more"
            )
        if self.padding == "zero":
            return F.conv2d(x, self.weight, stride=self.stride, padding=kernel // 2)
        return F.conv2d(pad(x, (kernel, kernel), self.padding), self.weight, stride=self.stride)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m h2 w2"]:
        """The definition: for every tap, the map moved by it, its channels mixed."""
        height, width = x.shape[2:]
        kernel, half = self.weight.shape[-1], self.weight.shape[-1] // 2
        if self.padding == "valid":
            height, width = height - kernel + 1, width - kernel + 1
        else:
            x = x.roll((half, half), (2, 3)) if self.padding == "circular" else F.pad(x, [half] * 4)
        total = x.new_zeros(())
        for i in range(kernel):
            for j in range(kernel):
                moved = x.roll((-i, -j), (2, 3))[:, :, : height : self.stride, : width : self.stride]
                total = total + torch.einsum("mc,nchw->nmhw", self.weight[:, :, i, j], moved)
        return total

    @property
    def least_side(self) -> int:
        """Pixels that a side of the input must have: half a kernel to continue it, or a whole one without padding."""
        kernel = self.weight.shape[-1]
        return {"circular": max(kernel // 2, 1), "zero": 1, "valid": kernel}[self.padding]

    def penalty(self) -> Float[Tensor, ""]:
        """L(K), to be added to the loss with a weight that trades accuracy for robustness."""
        return orthogonality_loss(self.weight, self.stride)

    def existence(self) -> Existence:
        """Whether this layer can be orthogonal, and why."""
        filters, channels, kernel, _ = self.weight.shape
        return existence(filters, channels, kernel, self.stride, 2, self.padding)

    def singular_values(self, size: tuple[int, int]) -> Float[Tensor, "h w rank"]:
        """By output frequency, for maps of `size` with circular padding. Raises BadInput for any other padding."""
        if self.padding != "circular":
            raise BadInput(f"padding='{self.padding}' has no singular values by frequency; see `layer_matrix`")
        return singular_values(self.weight, size, self.stride)

    def isometry_bounds(self) -> tuple[float, float]:
        """An interval that holds all singular values at every image size, with circular padding."""
        return isometry_bounds(self.weight, self.stride)

    def extra_repr(self) -> str:
        filters, channels, kernel, _ = self.weight.shape
        return f"{channels}, {filters}, kernel_size={kernel}, stride={self.stride}, padding={self.padding}"
