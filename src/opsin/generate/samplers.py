"""Samplers: from unit noise to an image along dx / d sigma = (x - D(x; sigma)) / sigma.

The noise levels are EDM's (Karras et al. 2022, arXiv:2206.00364, eq. 5). On them: Euler (which is DDIM in these
coordinates), Heun's second-order method with optional churn (their algorithm 2), and two multistep solvers in
lambda = -log sigma with one evaluation per step, DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) and UniPC
(Zhao et al. 2023, arXiv:2302.04867). The state is kept in float64; the denoiser sees its own precision.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import factorial, log

import torch
from jaxtyping import Float
from torch import Tensor

from opsin.errors import BadInput, UnknownName
from opsin.generate import Denoiser

Levels = Float[Tensor, " k"]
Model = Callable[[Tensor, Tensor], Tensor]


def noise_levels(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Levels:
    """sigma_max ... sigma_min, evenly spaced after the rho-th root, float64 (EDM, eq. 5, without the last 0)."""
    if steps < 2:
        raise BadInput(f"steps={steps} is too few; a sampler needs at least 2")
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + ramp * (low - high)) ** rho


@dataclass(frozen=True)
class OdeSampler:
    """The contract `Sampler`, on which the solvers below build; `solve` alone follows the ODE between given levels."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def nfe(self, steps: int) -> int:
        """Evaluations of the denoiser in a call with that many steps."""
        return steps

    def __call__(
        self, denoiser: Denoiser, noise: Float[Tensor, "n c h w"], steps: int, cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]:
        """Samples, in the precision of the noise. The last step, to level 0, is one denoising."""
        levels = noise_levels(steps, self.sigma_min, self.sigma_max, self.rho).to(noise.device)
        model = in_double(denoiser, noise.dtype, cond)
        x = self.solve(model, noise.double() * levels[0], levels)
        return self.finish(model, x, levels[-1], steps).to(noise.dtype)

    def invert(
        self, denoiser: Denoiser, images: Float[Tensor, "n c h w"], steps: int, cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]:
        """The ODE backwards: images to the noise that they come from, of unit variance if the denoiser is right."""
        levels = noise_levels(steps, self.sigma_min, self.sigma_max, self.rho).flip(0).to(images.device)
        x = self.solve(in_double(denoiser, images.dtype, cond), images.double(), levels)
        return (x / levels[-1]).to(images.dtype)

    def solve(self, model: Model, x: Tensor, levels: Levels) -> Tensor:
        """Follows the ODE through the levels, in either direction."""
        raise TypeError(f"{type(self).__name__} does not implement solve()")

    def finish(self, model: Model, x: Tensor, level: Tensor, steps: int) -> Tensor:
        """The last step, from the lowest level to 0."""
        return model(x, level)


def in_double(denoiser: Denoiser, dtype: torch.dtype, cond: Tensor | None) -> Model:
    """The denoiser as a function of a float64 state and one noise level."""

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        return denoiser(x.to(dtype), sigma.to(dtype).expand(len(x)), cond).double()

    return model


@dataclass(frozen=True)
class Euler(OdeSampler):
    """First order: straight to the next level. The same as DDIM without noise."""

    def solve(self, model: Model, x: Tensor, levels: Levels) -> Tensor:
        for here, there in pairwise(levels):
            x = x + (there - here) * (x - model(x, here)) / here
        return x


@dataclass(frozen=True)
class Heun(OdeSampler):
    """Second order: the mean of the slopes at both ends of a step; 2 n - 1 evaluations (EDM, algorithms 1 and 2).

    churn > 0 adds noise before each step between levels churn_min and churn_max, scaled by churn_noise.
    """

    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = float("inf")
    churn_noise: float = 1.0

    def nfe(self, steps: int) -> int:
        return 2 * steps - 1

    def solve(self, model: Model, x: Tensor, levels: Levels) -> Tensor:
        for here, there in pairwise(levels):
            x, here = self._churned(x, here, len(levels))
            slope = (x - model(x, here)) / here
            guess = x + (there - here) * slope
            x = x + (there - here) * 0.5 * (slope + (guess - model(guess, there)) / there)
        return x

    def finish(self, model: Model, x: Tensor, level: Tensor, steps: int) -> Tensor:
        return model(*self._churned(x, level, steps))

    def _churned(self, x: Tensor, level: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        if not (self.churn > 0 and self.churn_min <= level <= self.churn_max):
            return x, level
        raised = level * (1 + min(self.churn / steps, 2**0.5 - 1))
        return x + (raised**2 - level**2).sqrt() * self.churn_noise * torch.randn_like(x), raised


@dataclass(frozen=True)
class DPMSolver2M(OdeSampler):
    """DPM-Solver++(2M): exact in the linear part, the denoised image extrapolated from two levels."""

    def solve(self, model: Model, x: Tensor, levels: Levels) -> Tensor:
        before, h_before = None, None
        for here, there in pairwise(levels):
            clean, h = model(x, here), (here / there).log()
            ahead = clean if before is None else clean + (clean - before) * h / (2 * h_before)
            x = there / here * x - torch.expm1(-h) * ahead
            before, h_before = clean, h
        return x


@dataclass(frozen=True)
class UniPC(OdeSampler):
    """UniPC of a given order with B(h) = e^-h - 1: predict from past levels, then correct with the new evaluation.

    The next step starts from that evaluation too, so the corrector is free, and it raises the order by one.
    """

    order: int = 2

    def nfe(self, steps: int) -> int:
        return steps + 1

    def solve(self, model: Model, x: Tensor, levels: Levels) -> Tensor:
        past = [(levels[0], model(x, levels[0]))]  # the last `order` levels and their denoised images, newest first
        for here, there in pairwise(levels):
            h, clean = (here / there).log(), past[0][1]
            ratios = [float((here / level).log() / h) for level, _ in past[1:]]
            slopes = [(image - clean) / r for (_, image), r in zip(past[1:], ratios, strict=True)]
            base = there / here * x - torch.expm1(-h) * clean
            x = base + self._terms(h, ratios, slopes)
            new = model(x, there)
            x = base + self._terms(h, [*ratios, 1.0], [*slopes, new - clean])
            past = [(there, new), *past][: self.order]
        return x

    def _terms(self, h: Tensor, ratios: list[float], slopes: list[Tensor]) -> Tensor | float:
        """-B(h) sum_k a_k D_k, with a solving the order conditions sum_k a_k r_k^(j-1) = b_j, j = 1 ... (eq. 11)."""
        if not slopes:
            return 0.0
        count, step = len(slopes), -float(h)
        b, grow = [], torch.expm1(torch.tensor(step, dtype=torch.float64)).item()
        phi = grow / step - 1
        for j in range(1, count + 1):
            b.append(phi * factorial(j) / grow)
            phi = phi / step - 1 / factorial(j + 1)
        r = torch.tensor(ratios, dtype=torch.float64)
        system = torch.stack([r**j for j in range(count)])
        weights = torch.linalg.solve(system, torch.tensor(b, dtype=torch.float64))
        return -grow * torch.stack([w * slope for w, slope in zip(weights, slopes, strict=True)]).sum(0)


SAMPLERS: dict[str, type[OdeSampler]] = {"heun": Heun, "euler": Euler, "dpm2m": DPMSolver2M, "unipc": UniPC}


def sampler_of(name: str) -> OdeSampler:
    """The sampler of that name. Raises UnknownName."""
    if name not in SAMPLERS:
        raise UnknownName("sampler", name, SAMPLERS)
    return SAMPLERS[name]()


def convergence_order(
    sampler: OdeSampler, denoiser: Denoiser, exact: Callable[[Tensor], Tensor], x: Tensor, steps: tuple[int, int]
) -> float:
    """log2-style order of a sampler between two step counts, against the exact end point of the ODE."""
    errors = []
    for count in steps:
        levels = noise_levels(count + 1, sampler.sigma_min, sampler.sigma_max, sampler.rho)
        errors.append(float((sampler.solve(in_double(denoiser, torch.float64, None), x, levels) - exact(x)).norm()))
    return log(errors[0] / errors[1]) / log(steps[1] / steps[0])
