"""A slow network: a small network of coordinates whose output is the kernel of a fast one, at any resolution.

A multiplicative filter network (Fathony et al. 2021) with the sinusoids of MAGNet (Romero et al. 2022, 2110.08059):

    h_1 = g_1(x),   h_{l+1} = (W_l h_l + b_l) g_{l+1}(x),   kernel(x) = W h_L + b,   g_l(x) = sin(Omega_l x + phi_l)

with x in [-1, 1] along every axis, so that a finer grid samples the same function. Frequencies are drawn wide for the
first filter and narrower for later ones; the kernel's variance starts at 1 / fan_in, as He et al. want weights.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.layers.kept import Source
from opsin.layers.precision import without_autocast

KEPT_SIZES = 4  # kernels of so many resolutions are kept for inference


def grid(size: Sequence[int], device: torch.device | None = None) -> Float[Tensor, "p axes"]:
    """Coordinates from -1 to 1 of all positions, rows first; an axis of one position is at 0."""
    lines = [torch.linspace(-1, 1, n, device=device) if n > 1 else torch.zeros(1, device=device) for n in size]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).flatten(0, -2)


class SlowNet(nn.Module):
    """kernel = net(size): (dim, *size) values on a grid of this size, in float32, under autocast too.

    In eval mode without gradients the kernel of a resolution is computed once and kept until a parameter changes.

    Args:
        dim: channels of the kernel. axes: of its coordinates, 1 or 2.
        hidden, num_layers: width, and hidden layers after the first filter.
        omega: scale of the frequencies, 2 pi omega gamma radians per unit with gamma ~ Gamma(6 / l, 1) for filter l.
        fan_in: products that one output of the fast network sums up; the kernel's variance starts at its inverse.
    """

    def __init__(
        self, dim: int, axes: int = 2, hidden: int = 32, num_layers: int = 2, omega: float = 0.25, fan_in: int = 1
    ):
        super().__init__()
        self.axes = axes
        self.filters = nn.Linear(axes, (num_layers + 1) * hidden)  # of all layers
        self.linears = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(num_layers))
        self.output = nn.Linear(hidden, dim)
        self._init(omega, fan_in)
        self.forget()
        self.register_load_state_dict_post_hook(lambda module, _: module.forget())

    @torch.no_grad()
    def _init(self, omega: float, fan_in: int) -> None:
        for layer, rows in enumerate(self.filters.weight.chunk(len(self.linears) + 1), 1):
            spread = torch.distributions.Gamma(torch.tensor(6 / layer, device="cpu"), 1.0).sample((len(rows), 1))
            rows.mul_(2 * math.pi * omega * spread.to(rows.device))
        nn.init.zeros_(self.filters.bias)
        for linear in self.linears:
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
            nn.init.ones_(linear.bias)
        nn.init.normal_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        rms = self._hidden((32,) * self.axes).square().sum(-1).mean().sqrt()
        self.output.weight.div_(rms * math.sqrt(fan_in))

    def _hidden(self, size: Sequence[int]) -> Float[Tensor, "p h"]:
        x = grid(size, self.filters.weight.device)
        waves = _linear(self.filters, x).sin().chunk(len(self.linears) + 1, -1)
        h = waves[0]
        for linear, wave in zip(self.linears, waves[1:], strict=True):
            h = _linear(linear, h) * wave
        return h

    def generate(self, size: Sequence[int]) -> Float[Tensor, "d *size"]:
        """The kernel, computed anew."""
        return _linear(self.output, self._hidden(size)).T.unflatten(1, tuple(size))

    def forward(self, size: Sequence[int]) -> Float[Tensor, "d *size"]:
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if self.training or learning or torch.compiler.is_compiling():
            return self.generate(size)
        if not self._source.is_still(self.parameters()):
            self.forget()
            self._source = Source(self.parameters())
        if tuple(size) not in self._kept:
            if len(self._kept) == KEPT_SIZES:
                self._kept.pop(next(iter(self._kept)))
            with torch.inference_mode(False), torch.no_grad():
                self._kept[tuple(size)] = self.generate(size)
        return self._kept[tuple(size)]

    def forget(self) -> None:
        """Drops the kept kernels; needed by hand only after writing into `parameter.data`."""
        self._kept: dict[tuple[int, ...], Tensor] = {}
        self._source = Source()

    def train(self, mode: bool = True) -> "SlowNet":
        if mode:
            self.forget()
        return super().train(mode)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """In float32, whatever the parameters are and autocast wants: phases of many radians need it."""
    with without_autocast(x.device.type):
        return F.linear(x, layer.weight.float(), layer.bias.float())
