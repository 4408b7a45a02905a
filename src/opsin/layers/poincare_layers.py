"""Linear layer and batch normalisation of the Poincare ball, on tangent vectors at the origin.

Batch normalisation of Poincare ResNet (van Spengler et al. 2023, arXiv:2303.14027, section 3.3): points are moved so
that their mean m lands on a learned bias point b, and scaled along the geodesics from it:

    y = exp_b( sqrt(|scale| / (var + eps)) transport_{m -> b}(log_m(x)) ),   var = mean d(x, m)^2

with one learned scale, whose magnitude counts: training may take it below 0, where there is no root. The mean is the
midpoint, a closed form, where the Frechet mean needs an iteration. The authors' layer uses the batch in eval mode too,
so that an image's output depends on its neighbours; here running averages serve.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from opsin.layers.poincare import (
    Curved,
    OnBall,
    conformal,
    exp0,
    exp_map,
    from_distances,
    log0,
    log_map,
    midpoint,
    precise,
    signed_distances,
    square_distance,
    square_norm,
    transport,
)

Init = Literal["identity", "gaussian"]


@torch.no_grad()
def init_directions_(z: Float[Tensor, "n m"], init: Init) -> Tensor:
    """Half the (rectangular) identity, which cancels the 2 of the distance, or N(0, 1 / (2 n m)) (section 3.2)."""
    if init == "identity":
        return z.copy_(torch.eye(*z.shape, dtype=z.dtype, device=z.device) / 2)
    return z.normal_(std=(2 * z.numel()) ** -0.5)


class PoincareLinear(OnBall):
    """(..., n) -> (..., m) on tangent vectors. `weight` (m, n) holds the hyperplanes' normals, `bias` their offsets."""

    def __init__(self, dim_in: int, dim: int, curvature: Curved = 0.1, init: Init = "identity"):
        super().__init__(curvature)
        self.weight = nn.Parameter(torch.empty(dim, dim_in))
        self.bias = nn.Parameter(torch.zeros(dim))
        init_directions_(self.weight.T, init)

    def forward(self, v: Float[Tensor, "*b n"]) -> Float[Tensor, "*b m"]:
        c, weight = self.c, precise(self.weight)
        x = exp0(precise(v), c)
        distances = signed_distances(x @ weight.T, conformal(x, c), weight.norm(dim=1), precise(self.bias), c)
        return from_distances(distances, c).to(v.dtype)


class PoincareBatchNorm2d(OnBall):
    """(N, C, H, W) -> the same; every position is a point whose coordinates are the channels.

    momentum: weight of a new batch in the running mean (a tangent vector) and variance, which eval mode uses.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, curvature: Curved = 0.1, eps: float = 1e-6, momentum: float = 0.1):
        super().__init__(curvature)
        self.eps, self.momentum = eps, momentum
        self.bias = nn.Parameter(torch.zeros(dim))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(()))

    def mean(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "1 c 1 1"]:
        return midpoint(x, self.c, 1, (0, 2, 3))

    def forward(self, v: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        c = self.c
        x, bias = exp0(precise(v), c, 1), exp0(precise(self.bias)[:, None, None], c, 0)[None]
        if self.training:
            mean = self.mean(x)
            var = square_distance(mean, x, c, 1).mean()
            self._track(log0(mean, c, 1).flatten(), var)
        else:
            mean, var = exp0(precise(self.running_mean)[:, None, None], c, 0)[None], precise(self.running_var)
        moved = transport(mean, bias, log_map(mean, x, c, 1), c, 1)
        scale = precise(self.scale).abs().clamp_min(self.eps)
        return log0(exp_map(bias, (scale / (var + self.eps)).sqrt() * moved, c, 1), c, 1).to(v.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)


class FrechetBatchNorm2d(PoincareBatchNorm2d):
    """The same around the Frechet mean, which minimises the mean squared distance: the slow way.

    A learned curvature gets no gradient through the mean.
    """

    def mean(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "1 c 1 1"]:
        points = x.movedim(1, -1).flatten(0, 2)
        return FrechetMean.apply(points, float(self.c))[:, None, None][None]


class FrechetMean(torch.autograd.Function):
    """The mean of (p, n) points: iterated, and differentiated at the fixed point (Lou et al. 2020, 2003.00335).

    The squared distance is concave in q_i = c|x_i - m|^2 / ((1 - c|x_i|^2)(1 - c|m|^2)), so with its slopes a_i the sum
    of a_i q_i is a bound from above; its minimum, a closed form, is the next m. Where G(m, x) = mean log_m(x_i) = 0,

        dm = -(dG/dm)^(-1) dG/dx dx
    """

    tolerance, most = 1e-6, 1000  # relative length of the last step; steps

    @staticmethod
    def forward(ctx: Any, points: Float[Tensor, "p n"], c: float) -> Float[Tensor, " n"]:
        inside, mean = 1 - c * square_norm(points, -1), points[0]
        for _ in range(FrechetMean.most):
            q = c * square_norm(points - mean, -1) / (inside * (1 - c * square_norm(mean, -1)))
            root = q.clamp_min(1e-12).sqrt()
            weight = root.asinh() / (root * (1 + q).sqrt() * inside)
            pull, total = (weight * points).sum(0), (weight * (2 - inside)).sum()
            last, mean = mean, 2 * pull / (total + (total.square() - 4 * c * pull.square().sum()).sqrt())
            if (mean - last).norm() <= FrechetMean.tolerance * last.norm().clamp_min(1.0):
                break
        ctx.save_for_backward(points, mean)
        ctx.c = c
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " n"]) -> tuple[Tensor, None]:
        points, mean = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            residual = log_map(mean, points, ctx.c).mean(0)
            rows = [torch.autograd.grad(part, mean, retain_graph=True)[0] for part in residual]
            solved = torch.linalg.solve(torch.stack(rows).T, grad)
            return -torch.autograd.grad(residual, points, solved)[0], None
