"""Convolution of the Poincare ball: every patch is one hyperbolic point, and filters are hyperplanes.

van Spengler et al. 2023, "Poincare ResNet", arXiv:2303.14027, section 3.1, after HNN++ (Shimizu et al. 2021). Maps hold
tangent vectors at the origin. The C k^2 numbers of a patch, shrunk so that their norm is that of one position, are
mapped to the ball, and a fully connected layer of the ball takes them to C' coordinates, mapped back at the end:

    t = x beta(C k^2 / 2, 1/2) / beta(C / 2, 1/2),   patch = exp0(unfold(t)),   y = log0(FC(patch; z, r))

FC needs of a patch its inner products with the z_k and its norm alone, and exp0 only scales a vector. So the inner
products are an ordinary convolution of t, the norms a box filter of |t|^2, and no patch is ever formed.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.poincare import (
    Curved,
    OnBall,
    exp0,
    exp0_scale,
    from_distances,
    fully_connected,
    log0,
    precise,
    signed_distances,
)
from opsin.layers.poincare_layers import Init, init_directions_


def beta(a: float) -> float:
    """The beta function B(a, 1/2)."""
    return math.exp(math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5))


class PoincareConv2d(OnBall):
    """(N, C, H, W) -> (N, C', h, w) of tangent vectors, 'same' zero padding; computes in float32 at least.

    Args:
        dim_in, dim: C and C'. kernel_size: odd. stride: as of a convolution.
        curvature: c of the ball of curvature -c, a positive number or a LearnedCurvature.
        init: see `init_directions_`; the identity passes the first C' of the C k^2 entries of a patch, channels
            first, as published.
    Raises BadInput: an even kernel, a curvature that is not positive.
    """

    def __init__(
        self, dim_in: int, dim: int, kernel_size: int = 3, stride: int = 1, curvature: Curved = 0.1,
        init: Init = "identity",
    ):  # fmt: skip
        super().__init__(curvature)
        if kernel_size % 2 == 0:
            raise BadInput(f"kernel_size={kernel_size} is even; a Poincare convolution is centred, so take an odd one")
        self.kernel_size, self.stride = kernel_size, stride
        self.shrink = beta(dim_in * kernel_size**2 / 2) / beta(dim_in / 2)
        self.weight = nn.Parameter(torch.empty(dim, dim_in, kernel_size, kernel_size))  # z_k
        self.bias = nn.Parameter(torch.zeros(dim))  # r_k
        init_directions_(self.weight.view(dim, -1).T, init)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        c, t, weight = self.c, self.shrink * precise(x), precise(self.weight)
        k, stride, pad = self.kernel_size, self.stride, self.kernel_size // 2
        u = c * k**2 * F.avg_pool2d(t.square().sum(1, keepdim=True), k, stride, pad)  # c |patch|^2
        scale = exp0_scale(u)
        inner = scale * F.conv2d(t, weight, None, stride, pad)
        norm, r = weight.flatten(1).norm(dim=1)[:, None, None], precise(self.bias)[:, None, None]
        distances = signed_distances(inner, 2 / (1 - u * scale.square()), norm, r, c)
        return from_distances(distances, c, 1).to(x.dtype)

    def reference(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c2 h2 w2"]:
        """The definition, patch by patch, on the ball."""
        n, _, height, width = x.shape
        size = [(side - 1) // self.stride + 1 for side in (height, width)]
        patches = F.unfold(
            self.shrink * precise(x), self.kernel_size, padding=self.kernel_size // 2, stride=self.stride
        )
        points = exp0(patches.transpose(1, 2), self.c)
        y = fully_connected(points, self.weight.flatten(1).T, self.bias, self.c)
        return log0(y, self.c).transpose(1, 2).reshape(n, -1, *size).to(x.dtype)

    def extra_repr(self) -> str:
        out, inside = self.weight.shape[:2]
        return f"{inside}, {out}, kernel_size={self.kernel_size}, stride={self.stride}, c={float(self.c):.3g}"


class PoincareConv(PoincareConv2d):
    """The convolution that keeps the number of channels. Options: see `PoincareConv2d`."""

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        curvature: Curved = 0.1,
        init: Init = "identity",
    ):
        super().__init__(dim, dim, kernel_size, stride, curvature, init)
