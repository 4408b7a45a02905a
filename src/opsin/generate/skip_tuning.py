"""Skip-Tuning: scale each skip of a trained U-Net by a factor of its own while sampling.

Ma et al. 2024, "The Surprising Effectiveness of Skip-Tuning in Diffusion Sampling", arXiv:2402.15170. With few steps
each evaluation must bend noise a long way towards data, and long skips hold the network close to the identity. So the
decoder's concat(d_i, s_i) becomes concat(d_i, rho_i s_i), with rho_i rising linearly with depth,

    rho_i = rho_bottom + (rho_top - rho_bottom) i / k,     i = 0 the innermost skip, i = k the outermost,

and no weight changes. Where a GroupNorm follows, groups that lie wholly inside the skip lose the factor again, so it
acts through the shortcut around the norm and through groups that straddle the seam.

Any network works that has `skip_points()`: its joins, innermost first, each a module called as `join(x, skip)`, or a
`SkipPoint` for a module whose one input already ends in the skip (U-ViT's linear, latent-diffusion blocks).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput, TrainingFailed


@dataclass(frozen=True)
class SkipPoint:
    """Where a skip enters a decoder: a module called as module(x, skip).

    With `width`, a module whose first input is the concatenation already, the skip being its last `width` entries
    along `dim`.
    """

    module: nn.Module
    width: int | None = None
    dim: int = 1

    def split(self, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        """(decoder map, skip) from the inputs of the module."""
        if self.width is None:
            return inputs[0], inputs[1]
        own = inputs[0].shape[self.dim] - self.width
        return inputs[0].split((own, self.width), self.dim)

    def scaled(self, inputs: tuple[Any, ...], factor: Tensor) -> tuple[Any, ...]:
        """The same inputs with the skip times a factor, which is one number or one per sample."""
        x, skip = self.split(inputs)
        skip = skip * factor.to(skip).reshape(-1, *[1] * (skip.ndim - 1))
        return (x, skip, *inputs[2:]) if self.width is None else (torch.cat((x, skip), self.dim), *inputs[1:])


@runtime_checkable
class HasSkips(Protocol):
    """A network that declares its skips, innermost first."""

    def skip_points(self) -> Sequence[nn.Module | SkipPoint]: ...


def points_of(model: nn.Module) -> list[SkipPoint]:
    """The skip points of a network. Raises BadInput where it declares none."""
    points = model.skip_points() if isinstance(model, HasSkips) else []
    if not points:
        raise BadInput(f"{type(model).__name__} declares no skip connections; give it a method skip_points()")
    return [point if isinstance(point, SkipPoint) else SkipPoint(point) for point in points]


class SkipTuning:
    """The trick: `with SkipTuning(0.7).apply(denoiser): sampler(denoiser, ...)`.

    Args:
        rho_bottom, rho_top: the factors of the innermost and the outermost skip, linear in between.
        sigma_range: noise levels (low, high) between which the factors act; outside, the network is itself. The network
            must then be a `Denoiser`, called with sigma second.
        rhos: a factor for each skip, innermost first, instead of the line.
    """

    def __init__(
        self, rho_bottom: float = 0.8, rho_top: float = 1.0, sigma_range: tuple[float, float] | None = None,
        rhos: Sequence[float] | Tensor | None = None,
    ):  # fmt: skip
        if sigma_range is not None and not 0 <= sigma_range[0] < sigma_range[1]:
            raise BadInput(f"sigma_range={sigma_range} is empty; give two noise levels, the lower one first")
        self.rho_bottom, self.rho_top, self.sigma_range = rho_bottom, rho_top, sigma_range
        self.rhos = None if rhos is None else torch.as_tensor(rhos, dtype=torch.float32)

    def __repr__(self) -> str:
        line = f"{self.rho_bottom:g}, {self.rho_top:g}" if self.rhos is None else f"rhos={self.rhos.tolist()}"
        return f"SkipTuning({line}{f', sigma_range={self.sigma_range}' if self.sigma_range else ''})"

    def factors(self, skips: int) -> Float[Tensor, " k"]:
        """rho_i for a network with so many skips. Raises BadInput where `rhos` has another length."""
        if self.rhos is None:
            return torch.linspace(self.rho_bottom, self.rho_top, skips)
        if len(self.rhos) != skips:
            raise BadInput(f"rhos has {len(self.rhos)} factors, but the network has {skips} skips")
        return self.rhos

    @contextmanager
    def apply(self, generator: nn.Module) -> Iterator[nn.Module]:
        """Patches the network inside the `with` block; afterwards it is bit-identical to what it was."""
        points = points_of(generator)
        factors = self.factors(len(points))
        level = _CurrentLevel(self.sigma_range)
        handles = [generator.register_forward_pre_hook(level, with_kwargs=True)] if self.sigma_range else []
        try:
            for point, factor in zip(points, factors, strict=True):
                handles.append(point.module.register_forward_pre_hook(_scaler(point, factor, level)))
            yield generator
        finally:
            for handle in handles:
                handle.remove()


class _CurrentLevel:
    """Remembers, as a hook on the denoiser, which samples of the batch are inside the range of noise levels."""

    def __init__(self, sigma_range: tuple[float, float] | None):
        self.range, self.inside = sigma_range, torch.tensor(True)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        assert self.range is not None
        sigma = torch.as_tensor(options["sigma"] if "sigma" in options else inputs[1])
        self.inside = (sigma >= self.range[0]) & (sigma <= self.range[1])


def _scaler(point: SkipPoint, factor: Tensor, level: _CurrentLevel) -> Callable[[nn.Module, Any], tuple[Any, ...]]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        rho = factor.to(inputs[0].device)
        return point.scaled(inputs, torch.where(level.inside.to(rho.device), rho, torch.ones_like(rho)))

    return hook


@dataclass(frozen=True)
class Tuned:
    """The best setting of a grid, and what the metric was at each (rho_bottom, rho_top)."""

    trick: SkipTuning
    scores: dict[tuple[float, float], float]


def tune(
    model: nn.Module, metric: Callable[[nn.Module], float],
    rho_bottoms: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1), rho_tops: Sequence[float] = (1.0,),
    sigma_range: tuple[float, float] | None = None,
) -> Tuned:  # fmt: skip
    """Grid search: the factors at which metric(patched model) is lowest. Report on other seeds than you tune on."""
    scores = {}
    for bottom, top in product(rho_bottoms, rho_tops):
        with SkipTuning(bottom, top, sigma_range).apply(model):
            scores[bottom, top] = float(metric(model))
    best = min(scores, key=scores.__getitem__)
    return Tuned(SkipTuning(*best, sigma_range), scores)


def learn(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int = 100, lr: float = 0.01,
    start: SkipTuning | None = None,
) -> SkipTuning:  # fmt: skip
    """Gradient descent (Adam) on the factors alone, e.g. of a feature-space or distillation loss; weights stay frozen.

    start: where to begin; factors of 1 by default, acting at all noise levels. Raises TrainingFailed on a bad loss.
    """
    start = start or SkipTuning(1.0, 1.0)
    rhos = start.factors(len(points_of(model))).detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([rhos], lr)
    trick = SkipTuning(sigma_range=start.sigma_range, rhos=rhos)
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for step in range(steps):
            optimiser.zero_grad()
            with trick.apply(model):
                value = loss(model)
            if not bool(value.isfinite()):
                raise TrainingFailed(f"the loss of the skip factors is {value.item()} at step {step}; lower lr")
            value.backward()
            optimiser.step()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return SkipTuning(sigma_range=start.sigma_range, rhos=rhos.detach())
