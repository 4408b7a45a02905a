"""A denoiser known in closed form: for data from a mixture of Gaussians, at any noise level.

If p = sum_k w_k N(m_k, s^2 I), then x = clean + sigma noise has density sum_k w_k N(m_k, (s^2 + sigma^2) I), and

    D(x; sigma) = sum_k p(k | x) (m_k + s^2 / (s^2 + sigma^2) (x - m_k)).

With one component the probability-flow ODE has the solution

    x(sigma) = m + (x_0 - m) sqrt((s^2 + sigma^2) / (s^2 + sigma_0^2)).

Samplers, tricks and diagnostics are tested against it.
"""

from math import log, pi

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GaussianMixture(nn.Module):
    """The exact denoiser of data from sum_k weights_k N(means_k, std^2 I). It takes no labels."""

    def __init__(self, means: Float[Tensor, "k c h w"], std: float, weights: Float[Tensor, " k"] | None = None):
        super().__init__()
        self.std = std
        self.register_buffer("means", means)
        weights = torch.ones(len(means)) if weights is None else weights
        self.register_buffer("log_weights", weights.log().log_softmax(0))

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def _joint(self, x: Tensor, sigma: Tensor) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k c h w"], Tensor]:
        """log p(k, x), x - m_k, and the variance of x given k."""
        sigma = torch.as_tensor(sigma, device=x.device, dtype=x.dtype).expand(len(x))
        variance = (self.std**2 + sigma.square())[:, None]
        away = x[:, None] - self.means.to(x.dtype)
        distance = away.flatten(2).square().sum(2)
        constant = 0.5 * x[0].numel() * (log(2 * pi) + variance.log())
        return self.log_weights.to(x.dtype) - 0.5 * distance / variance - constant, away, variance

    def log_density(self, x: Float[Tensor, "n c h w"], sigma: Tensor) -> Float[Tensor, " n"]:
        """log p(x; sigma)."""
        return self._joint(x, sigma)[0].logsumexp(1)

    def forward(
        self, x: Float[Tensor, "n c h w"], sigma: Float[Tensor, " n"], cond: Tensor | None = None
    ) -> Float[Tensor, "n c h w"]:
        joint, away, variance = self._joint(x, sigma)
        clean = self.means.to(x.dtype) + (self.std**2 / variance)[..., None, None, None] * away
        return (joint.softmax(1)[..., None, None, None] * clean).sum(1)

    def flow(self, x: Float[Tensor, "n c h w"], start: float, end: float) -> Float[Tensor, "n c h w"]:
        """Where the ODE takes x from noise level `start` to `end`; exact, for one component."""
        ratio = ((self.std**2 + end**2) / (self.std**2 + start**2)) ** 0.5
        mean = self.means[0].to(x.dtype)
        return mean + (x - mean) * ratio

    def draw(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n c h w"]:
        """Samples of the data itself."""
        component = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        return self.means[component] + self.std * torch.randn(n, *self.sample_shape, generator=generator)
