"""What a change to a denoiser does: its loss in pixels and in features, how Gaussian inverted noise is, distances.

The measurements of Skip-Tuning's section 4 (arXiv:2402.15170), useful for any trick.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.generate import Denoiser
from opsin.generate.edm import noised
from opsin.generate.samplers import Heun, OdeSampler
from opsin.generate.skip_tuning import points_of

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the kernel, in units of the median squared distance


@torch.no_grad()
def denoising_loss(
    denoiser: Denoiser, images: Float[Tensor, "n c h w"], sigmas: Sequence[float], *, seed: int = 0,
    features: Callable[[Tensor], Tensor] = torch.Tensor.flatten, cond: Tensor | None = None, batch: int = 512,
) -> dict[float, float]:  # fmt: skip
    """Mean over images and entries of (f(D(x + sigma n; sigma)) - f(x))^2, for each sigma, on the same noise.

    features: f, an image encoder; pixels by default. images: in the denoiser's range, [-1, 1] for EDM.
    """
    losses = {}
    for sigma in sigmas:
        generator, total, count = torch.Generator().manual_seed(seed), 0.0, 0
        for start in range(0, len(images), batch):
            clean = images[start : start + batch]
            level = torch.full((len(clean),), sigma)
            labels = None if cond is None else cond[start : start + batch]
            guess = denoiser(noised(clean, level, generator), level, labels)
            error = (features(guess) - features(clean)).square()
            total, count = total + float(error.double().sum()), count + error.numel()
        losses[sigma] = total / count
    return losses


def mmd(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """The squared maximum mean discrepancy between two samples, unbiased: around 0 (also below) for equal laws.

    A sum of Gaussian kernels whose widths are multiples of the median distance (Gretton et al. 2012, eq. 3).
    """
    x, y = x.double(), y.double()
    xx, yy, xy = (torch.cdist(a, b).square() for a, b in ((x, x), (y, y), (x, y)))
    median = xy.median()

    def kernel(distances: Tensor) -> Tensor:
        return torch.stack([(-distances / (2 * width * median)).exp() for width in BANDWIDTHS]).sum(0)

    def off_diagonal_mean(gram: Tensor) -> Tensor:
        return (gram.sum() - gram.diagonal().sum()) / (len(gram) * (len(gram) - 1))

    return float(off_diagonal_mean(kernel(xx)) + off_diagonal_mean(kernel(yy)) - 2 * kernel(xy).mean())


@torch.no_grad()
def inversion_mmd(
    denoiser: Denoiser, images: Float[Tensor, "n c h w"], steps: int = 18, *, sampler: OdeSampler | None = None,
    cond: Tensor | None = None, seed: int = 0,
) -> float:  # fmt: skip
    """MMD between unit noise and what the ODE turns images into, run from data to noise: 0 for a perfect denoiser."""
    noise = (sampler or Heun()).invert(denoiser, images, steps, cond)
    reference = torch.randn(noise.shape, generator=torch.Generator().manual_seed(seed))
    return mmd(noise.flatten(1), reference.flatten(1))


@torch.no_grad()
def skip_norm_ratios(model: nn.Module, *inputs: Tensor | None) -> list[float]:
    """|s_i| / |d_i| at every join of a network in one forward pass, innermost first."""
    points, ratios = points_of(model), {}

    def measure(i: int) -> Callable[[nn.Module, tuple], None]:
        def hook(module: nn.Module, joined: tuple) -> None:
            x, skip = points[i].split(joined)
            ratios[i] = float(skip.norm() / x.norm())

        return hook

    handles = [point.module.register_forward_pre_hook(measure(i)) for i, point in enumerate(points)]
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [ratios[i] for i in range(len(points))]


def frechet_distance(a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) between Gaussians fitted to two sets of features."""
    a, b = a.double(), b.double()
    ca, cb = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root)
