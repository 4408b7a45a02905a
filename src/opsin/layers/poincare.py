"""Geometry of the Poincare ball: the points with c |x|^2 < 1, a space of constant curvature -c.

Features live in the tangent space at the origin (plain vectors); a hyperbolic layer maps them to the ball, computes
there, and maps back. Every radial map multiplies a vector by a ratio of u = c |x|^2 alone, and all others follow from
these and from Mobius addition:

    exp0(v) = v tanh(a) / a,   log0(y) = y atanh(a) / a,   a = sqrt(u)
    x (+) y = ((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2)
    exp_x(v) = x (+) exp0(lam_x v / 2),   log_x(y) = 2 / lam_x log0(-x (+) y),   lam_x = 2 / (1 - c|x|^2)

The ratios and the addition have backward passes written by hand, as in Poincare ResNet (van Spengler et al. 2023,
arXiv:2303.14027, section 3.4): few nodes in the graph, and gradients that are exact at the origin. Points stay a little
inside the ball: float32 cannot tell them from its border otherwise. They are float32 at least, whatever comes in.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from opsin.errors import BadInput

Curvature = Tensor | float
SMALL = 2e-3  # below this u the ratios are their power series: the closed forms cancel there
MARGIN = {torch.float32: 4e-3, torch.float64: 1e-5}  # relative distance that points keep from the border
LARGEST_SINH = 40.0  # arguments beyond it overflow the squares of float32


def precise(x: Tensor) -> Tensor:
    """The same, in float32 if it is less precise."""
    return x if x.dtype in MARGIN else x.float()


def border(dtype: torch.dtype) -> float:
    """The largest sqrt(c) |x| of a point."""
    return 1 - MARGIN[dtype]


def _series(u: Tensor, *terms: float) -> tuple[Tensor, Tensor]:
    """A polynomial in u and its derivative."""
    value, slope = torch.zeros_like(u), torch.zeros_like(u)
    for term in reversed(terms):
        slope = slope * u + value
        value = value * u + term
    return value, slope


def _tanh(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """min(tanh a, border) / a, and its derivative by u."""
    tanh, most = a.tanh(), border(u.dtype)
    inside, ratio = tanh < most, tanh.clamp_max(most) / a
    return ratio, (inside * (1 - tanh.square()) - ratio) / (2 * u)


def _atanh(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """atanh(a) / a for a < 1, and its derivative by u."""
    a = a.clamp_max(1 - torch.finfo(u.dtype).eps)
    ratio = a.atanh() / a
    return ratio, (1 / (1 - a.square()) - ratio) / (2 * a.square())


def _half_asinh(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """min(asinh(a) / 2, atanh border) / a, and its derivative by u."""
    half, most = a.asinh() / 2, math.atanh(border(u.dtype))
    inside, ratio = half < most, half.clamp_max(most) / a
    return ratio, (inside / (2 * (1 + u).sqrt()) - ratio) / (2 * u)


def _inside(u: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """min(1, border / a), and its derivative by u."""
    ratio = (border(u.dtype) / a).clamp_max(1)
    return ratio, -ratio * (ratio < 1) / (2 * u)


SERIES: dict[Callable, tuple[float, ...]] = {
    _tanh: (1, -1 / 3, 2 / 15, -17 / 315), _atanh: (1, 1 / 3, 1 / 5, 1 / 7),
    _half_asinh: (1 / 2, -1 / 12, 3 / 80, -15 / 672), _inside: (1,),
}  # fmt: skip


class Ratio(torch.autograd.Function):
    """A ratio of u = c |x|^2, elementwise, with its own derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, kind: Callable) -> Tensor:
        value, slope = _ratio(u, kind)
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


def _ratio(u: Tensor, kind: Callable) -> tuple[Tensor, Tensor]:
    large = u.clamp_min(SMALL)
    near, far = _series(u, *SERIES[kind]), kind(large, large.sqrt())
    return torch.where(u < SMALL, near[0], far[0]), torch.where(u < SMALL, near[1], far[1])


def ratio(u: Tensor, kind: Callable) -> Tensor:
    """One of the ratios above; compilers see its forward pass only where no gradient is asked for."""
    return _ratio(u, kind)[0] if torch.compiler.is_compiling() else Ratio.apply(u, kind)


def square_norm(x: Tensor, dim: int) -> Tensor:
    return x.square().sum(dim, keepdim=True)


def exp0_scale(u: Tensor) -> Tensor:
    """What `exp0` multiplies a vector by, from u = c |v|^2."""
    return ratio(u, _tanh)


def exp0(v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """A tangent vector at the origin -> the point where its geodesic ends, kept inside the border."""
    v = precise(v)
    return v * exp0_scale(c * square_norm(v, dim))


def log0(y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The inverse of `exp0`."""
    y = precise(y)
    return y * ratio(c * square_norm(y, dim), _atanh)


def project(x: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The nearest point inside the border."""
    x = precise(x)
    return x * ratio(c * square_norm(x, dim), _inside)


class MobiusAdd(torch.autograd.Function):
    """x (+) y along one axis; both may broadcast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, c: Tensor, dim: int) -> Tensor:
        x2, y2, xy = square_norm(x, dim), square_norm(y, dim), (x * y).sum(dim, keepdim=True)
        ctx.save_for_backward(x, y, c, x2, y2, xy)
        ctx.dim = dim
        return _mobius(x, y, c, x2, y2, xy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """With y~ = (A x + B y) / D and g the gradient: d y~ = (dA x + A dx + dB y + B dy - y~ dD) / D."""
        x, y, c, x2, y2, xy = ctx.saved_tensors
        gx, gy = ((grad * side).sum(ctx.dim, keepdim=True) for side in (x, y))
        a, b, d = 1 + 2 * c * xy + c * y2, 1 - c * x2, _denominator(c, x2, y2, xy)
        out = (a * gx + b * gy) / d  # <g, y~>
        to_xy, to_x2, to_y2 = 2 * c * (gx - out) / d, -c * (gy + c * y2 * out) / d, c * (gx - c * x2 * out) / d
        grad_x = (a / d) * grad + to_xy * y + 2 * to_x2 * x
        grad_y = (b / d) * grad + to_xy * x + 2 * to_y2 * y
        grad_c = ((2 * xy + y2) * gx - x2 * gy - (2 * xy + 2 * c * x2 * y2) * out) / d
        return grad_x.sum_to_size(x.shape), grad_y.sum_to_size(y.shape), grad_c.sum_to_size(c.shape), None


def _denominator(c: Tensor, x2: Tensor, y2: Tensor, xy: Tensor) -> Tensor:
    return (1 + 2 * c * xy + c.square() * x2 * y2).clamp_min(1e-15)


def _mobius(x: Tensor, y: Tensor, c: Tensor, x2: Tensor, y2: Tensor, xy: Tensor) -> Tensor:
    return ((1 + 2 * c * xy + c * y2) * x + (1 - c * x2) * y) / _denominator(c, x2, y2, xy)


def mobius_add(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """x (+) y, the ball's translation of y by x."""
    c = torch.as_tensor(c, dtype=x.dtype, device=x.device)
    if torch.compiler.is_compiling():
        return _mobius(x, y, c, square_norm(x, dim), square_norm(y, dim), (x * y).sum(dim, keepdim=True))
    return MobiusAdd.apply(x, y, c, dim)


def conformal(x: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """lam_x = 2 / (1 - c|x|^2), by which lengths at x exceed Euclidean ones."""
    return 2 / (1 - c * square_norm(x, dim)).clamp_min(1e-15)


def exp_map(x: Tensor, v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """A tangent vector at x -> the point where its geodesic ends."""
    return project(mobius_add(x, exp0(conformal(x, c, dim) / 2 * v, c, dim), c, dim), c, dim)


def log_map(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The tangent vector at x whose geodesic ends at y."""
    return 2 / conformal(x, c, dim) * log0(mobius_add(-x, y, c, dim), c, dim)


def distance(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """2 / sqrt(c) atanh(sqrt(c) |(-x) (+) y|); `dim` stays as 1. Its gradient at x = y is 0."""
    return square_distance(x, y, c, dim).clamp_min(1e-30).sqrt()


def square_distance(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The squared distance, smooth everywhere."""
    return 4 * square_norm(log0(mobius_add(-x, y, c, dim), c, dim), dim)


def gyration(u: Tensor, v: Tensor, w: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """gyr[u, v] w = -(u (+) v) (+) (u (+) (v (+) w)), a rotation, in closed form."""
    u2, v2 = square_norm(u, dim), square_norm(v, dim)
    uv, uw, vw = ((p * q).sum(dim, keepdim=True) for p, q in ((u, v), (u, w), (v, w)))
    a = -(c**2) * uw * v2 + c * vw + 2 * c**2 * uv * vw
    b = -(c**2) * vw * u2 - c * uw
    d = 1 + 2 * c * uv + c**2 * u2 * v2
    return w + 2 * (a * u + b * v) / d.clamp_min(1e-15)


def transport(x: Tensor, y: Tensor, v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """A tangent vector at x moved along the geodesic to y."""
    return gyration(y, -x, v, c, dim) * (conformal(x, c, dim) / conformal(y, c, dim))


def midpoint(x: Tensor, c: Curvature, dim: int, axes: tuple[int, ...]) -> Tensor:
    """The half-scaled Einstein midpoint of points over some axes, which stay as 1 (section 3.3)."""
    weight = conformal(x, c, dim) / 2
    count = weight.numel() // weight.sum(axes).numel()
    t = (weight * x).sum(axes, keepdim=True) / (weight.sum(axes, keepdim=True) - count / 2)
    gamma = (1 - c * square_norm(t, dim)).clamp_min(1e-15).rsqrt()
    return project(gamma / (1 + gamma) * t, c, dim)


def signed_distances(
    inner: Tensor, lam: Tensor, norm: Float[Tensor, " m *_"], r: Float[Tensor, " m *_"] | None, c: Curvature
) -> Tensor:
    """v_k: distances to hyperplanes of normals z_k and offsets r_k, times 2 |z_k| (HNN++, Shimizu et al. 2021).

    inner: <x, z_k>. lam: lam_x, which the first repository has upside down, 2 (1 - c|x|^2). norm: |z_k|.
    """
    root, norm = c**0.5, norm.clamp_min(1e-15)
    side = root * lam * inner / norm
    if r is not None:
        shift = 2 * root * r
        side = side * shift.cosh() - (lam - 1) * shift.sinh()
    return 2 * norm / root * side.asinh()


def from_distances(v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The point at signed distances v_k from the axes' hyperplanes, as a tangent vector at the origin.

    With w = sinh(sqrt(c) v) / sqrt(c) the point is w / (1 + sqrt(1 + c|w|^2)), and log0 of it is
    w asinh(sqrt(c)|w|) / (2 sqrt(c)|w|).
    """
    root, v = c**0.5, precise(v)
    w = (root * v).clamp(-LARGEST_SINH, LARGEST_SINH).sinh() / root
    return w * ratio(c * square_norm(w, dim), _half_asinh)


def fully_connected(
    x: Float[Tensor, "*b n"], z: Float[Tensor, "n m"], r: Float[Tensor, " m"] | None, c: Curvature
) -> Float[Tensor, "*b m"]:
    """The ball's linear layer from its definition: a point to a point."""
    x, z, r = precise(x), precise(z), None if r is None else precise(r)
    v = signed_distances(x @ z, conformal(x, c), z.norm(dim=0), r, c)
    w = (c**0.5 * v).clamp(-LARGEST_SINH, LARGEST_SINH).sinh() / c**0.5
    return project(w / (1 + (1 + c * square_norm(w, -1)).sqrt()), c)


def mobius_residual(branch: Tensor, shortcut: Tensor, c: Curvature, dim: int = 1) -> Tensor:
    """log0(exp0(branch) (+) exp0(shortcut)) of tangent maps, along the CHANNELS of (N, C, H, W).

    The first repository maps and adds along the last axis, the width of the image.
    """
    x, y = exp0(precise(branch), c, dim), exp0(precise(shortcut), c, dim)
    return log0(project(mobius_add(x, y, c, dim), c, dim), c, dim).to(branch.dtype)


def check_curvature(c: float) -> None:
    """Raises BadInput where c is not a positive number."""
    if not 0 < c < math.inf:
        raise BadInput(f"curvature={c} is not positive and finite; it is c of a ball of curvature -c, such as 0.1")


class LearnedCurvature(nn.Module):
    """c = softplus(free): a curvature that trains and stays positive.

    start: the first c. Raises BadInput where it is not positive.
    """

    def __init__(self, start: float = 0.1):
        super().__init__()
        check_curvature(start)
        self.free = nn.Parameter(
            torch.tensor(start + math.log(-math.expm1(-start)))
        )  # log(exp(start) - 1), no overflow

    def forward(self) -> Float[Tensor, ""]:
        return F.softplus(self.free)


Curved = float | LearnedCurvature  # what layers take as their curvature


class OnBall(nn.Module):
    """A layer of the ball of curvature -c.

    curvature: c, a positive number, or a `LearnedCurvature`, which several layers may share.
    Raises BadInput where c is not positive.
    """

    def __init__(self, curvature: Curved):
        super().__init__()
        if not isinstance(curvature, nn.Module):
            check_curvature(curvature)
        self.curvature = curvature

    @property
    def c(self) -> Curvature:
        return precise(self.curvature()) if isinstance(self.curvature, nn.Module) else self.curvature
