"""Complex normalisation: the vector (Re, Im) is whitened, not scaled (Trabelsi et al. 2018, 1705.09792, section 3.5).

    V = Cov(Re, Im) + eps I,   z~ = V^(-1/2) (z - E z),   y = Gamma z~ + beta

with a symmetric or free 2x2 matrix Gamma per channel. Scaling both parts alike would leave their correlation, hence an
ellipse instead of a circle. The inverse square root has a closed form: with s = sqrt(det V), t = sqrt(trace V + 2 s),

    V^(-1/2) = [[V_ii + s, -V_ri], [-V_ri, V_rr + s]] / (s t)

Where the parts are nearly proportional, det Cov is a small difference of large numbers and rounding may make it
negative. So det V is taken as max(det Cov, 0) + eps trace Cov + eps^2, which is at least eps^2.
"""

import torch
from jaxtyping import Complex
from torch import Tensor, nn

Covariance = tuple[Tensor, Tensor, Tensor]  # V_rr, V_ri, V_ii


def inverse_root(rr: Tensor, ri: Tensor, ii: Tensor, eps: float = 0.0) -> Covariance:
    """The entries (rr, ri, ii) of (Cov + eps I)^(-1/2) of symmetric 2x2 matrices, elementwise; without eps positive."""
    s = ((rr * ii - ri.square()).clamp_min(0) + eps * (rr + ii) + eps**2).sqrt()
    rr, ii = rr + eps, ii + eps
    scale = 1 / (s * (rr + ii + 2 * s).sqrt())
    return (ii + s) * scale, -ri * scale, (rr + s) * scale


def statistics(z: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Covariance]:
    """Mean and (biased) covariance over some axes, which stay as 1."""
    mean = z.mean(axes, keepdim=True)
    u, v = (z - mean).real, (z - mean).imag
    rr, ri, ii = (part.mean(axes, keepdim=True) for part in (u.square(), u * v, v.square()))
    return mean, (rr, ri, ii)


def whiten(z: Tensor, mean: Tensor, covariance: Covariance, eps: float) -> Tensor:
    """V^(-1/2) (z - mean), complex."""
    rr, ri, ii = inverse_root(*covariance, eps)
    u, v = (z - mean).real, (z - mean).imag
    return torch.complex(rr * u + ri * v, ri * u + ii * v)


class Affine(nn.Module):
    """z -> Gamma z + beta with a real 2x2 matrix and an offset per element of `shape`; Gamma starts as `diagonal` I.

    bias: whether there is an offset.
    """

    def __init__(self, shape: tuple[int, ...], diagonal: float = 1.0, bias: bool = True):
        super().__init__()
        eye = torch.eye(2).reshape(2, 2, *[1] * len(shape)).expand(2, 2, *shape)
        self.weight = nn.Parameter(diagonal * eye)
        self.bias = nn.Parameter(torch.zeros(2, *shape)) if bias else None

    def forward(self, z: Tensor, tail: int = 0) -> Tensor:
        """tail: axes of z that follow those of `shape`."""
        (rr, ri), (ir, ii) = self.weight[(..., *[None] * tail)]
        real, imag = (0, 0) if self.bias is None else self.bias[(..., *[None] * tail)]
        return torch.complex(rr * z.real + ri * z.imag + real, ir * z.real + ii * z.imag + imag)


class NoAffine(nn.Module):
    """What a norm without Gamma and beta has in their place."""

    def forward(self, z: Tensor, tail: int = 0) -> Tensor:
        return z


class ComplexBatchNorm(nn.Module):
    """(N, C, ...) complex -> the same with (Re, Im) of every channel white over batch and space.

    Args:
        momentum: weight of a new batch in the running mean (2 numbers) and covariance (2x2), which eval mode uses.
        diagonal: start of Gamma; 1 as in the authors' package, 1 / sqrt 2 in Trabelsi et al. (a mean |y|^2 of 1).
        affine: whether there are Gamma and beta.
        track_running_stats: off, eval mode uses the batch too.
    """

    running_mean: Tensor | None
    running_covariance: Tensor | None

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, diagonal: float = 1.0, affine: bool = True,
        track_running_stats: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.affine = Affine((num_features,), diagonal) if affine else NoAffine()
        eye = torch.eye(2)[:, :, None].repeat(1, 1, num_features)
        self.register_buffer("running_mean", torch.zeros(2, num_features) if track_running_stats else None)
        self.register_buffer("running_covariance", eye if track_running_stats else None)

    def forward(self, z: Complex[Tensor, "n c ..."]) -> Complex[Tensor, "n c ..."]:
        shape = (1, -1, *[1] * (z.ndim - 2))
        if self.training or self.running_mean is None or self.running_covariance is None:
            mean, covariance = statistics(z, (0, *range(2, z.ndim)))
            if self.training:
                self._track(mean.flatten(), [entry.flatten() for entry in covariance])
        else:
            mean = torch.complex(*self.running_mean.to(z.real.dtype)).view(shape)
            (rr, ri), (_, ii) = self.running_covariance.to(z.real.dtype)
            covariance = (rr.view(shape), ri.view(shape), ii.view(shape))
        return self.affine(whiten(z, mean, covariance, self.eps), z.ndim - 2)

    @torch.no_grad()
    def _track(self, mean: Tensor, covariance: list[Tensor]) -> None:
        rr, ri, ii = covariance
        both = torch.stack((torch.stack((rr, ri)), torch.stack((ri, ii))))
        for kept, new in (
            (self.running_mean, torch.stack((mean.real, mean.imag))), (self.running_covariance, both),
        ):  # fmt: skip
            if kept is not None:
                kept.lerp_(new.to(kept.dtype), self.momentum)


class NaiveBatchNorm(nn.Module):
    """Batch normalisation of the parts on their own, which leaves their correlation ("naive" in the package)."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * num_features, eps, momentum)

    def forward(self, z: Complex[Tensor, "n c ..."]) -> Complex[Tensor, "n c ..."]:
        parts = torch.cat((z.real, z.imag), 1)
        return torch.complex(*self.norm(parts.flatten(2) if z.ndim > 2 else parts).view(parts.shape).chunk(2, 1))


class ComplexLayerNorm(nn.Module):
    """Whitens every sample over its last axes `normalized_shape`, with a 2x2 matrix and offset per element of it.

    elementwise_affine, bias: whether there are these matrices, and offsets with them.
    """

    def __init__(
        self, normalized_shape: int | tuple[int, ...], eps: float = 1e-5, elementwise_affine: bool = True,
        bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.axes, self.eps = tuple(range(-len(shape), 0)), eps
        self.affine = Affine(shape, bias=bias) if elementwise_affine else NoAffine()

    def forward(self, z: Complex[Tensor, "..."]) -> Complex[Tensor, "..."]:
        return self.affine(whiten(z, *statistics(z, self.axes), self.eps))


class ComplexLayerNorm2d(ComplexLayerNorm):
    """The same over the channels of every position of an (N, C, H, W) map."""

    def forward(self, z: Complex[Tensor, "n c h w"]) -> Complex[Tensor, "n c h w"]:
        return super().forward(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ComplexGroupNorm(nn.Module):
    """Whitens every sample over each of `num_groups` groups of channels, all positions together.

    The package's function takes the statistics of the first two samples for all, and mixes groups; this one does not.
    affine: whether every channel has a 2x2 matrix and an offset.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.affine = Affine((num_channels,)) if affine else NoAffine()

    def forward(self, z: Complex[Tensor, "n c ..."]) -> Complex[Tensor, "n c ..."]:
        groups = z.reshape(len(z), self.num_groups, -1)
        white = whiten(groups, *statistics(groups, (2,)), self.eps)
        return self.affine(white.view(z.shape), z.ndim - 2)
