"""Two older ways to slide a restorer between two behaviours, to compare tunable convolutions with.

Deep network interpolation (Wang et al. 2018, "Deep Network Interpolation for Continuous Imagery Effect Transition",
arXiv:1811.10515) mixes the weights of two networks, the second of which was fine-tuned from the first:

    theta(t) = (1 - t) theta_A + t theta_B

AdaFM (He, Dong & Qiao 2019, "Modulating Image Restoration with Continual Levels via Adaptive Feature Modification
Layers", arXiv:1904.08118) freezes network A and learns for B a depthwise filter behind every convolution, which is then
mixed with the filter that changes nothing: g(t) = I + t (g - I).
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from opsin.errors import BadInput
from opsin.layers.replace import with_layers_replaced


def interpolate_networks(first: nn.Module, second: nn.Module, t: float) -> nn.Module:
    """A network with the weights (1 - t) first + t second; counters and the like are the first's.

    Raises BadInput where the two have other names or shapes of weights.
    """
    a, b = first.state_dict(), second.state_dict()
    if {k: v.shape for k, v in a.items()} != {k: v.shape for k, v in b.items()}:
        raise BadInput("the two networks have different weights; interpolate one with its own fine-tuned copy")
    mixed = copy.deepcopy(first)
    mixed.load_state_dict({k: torch.lerp(v, b[k], t) if v.is_floating_point() else v for k, v in a.items()})
    return mixed


class AdaFM(nn.Module):
    """A frozen convolution and a learned depthwise filter behind it; `amount` t = 0 is the convolution alone."""

    amount: Tensor

    def __init__(self, conv: nn.Conv2d, side: int = 1):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        weight = conv.weight.new_zeros(conv.out_channels, 1, side, side)
        weight[:, :, side // 2, side // 2] = 1
        self.register_buffer("same", weight.clone())
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels))
        self.register_buffer("amount", conv.weight.new_ones(()))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h2 w2"]:
        filters = torch.lerp(self.same, self.weight, self.amount)
        y, side = self.conv(x), filters.shape[-1]
        return F.conv2d(y, filters, self.amount * self.bias, padding=side // 2, groups=len(filters))


def modulated(model: nn.Module, side: int = 1) -> nn.Module:
    """A copy of a network with a frozen body and an AdaFM filter of `side` x `side` behind every convolution.

    Raises BadInput: no convolution, an even side.
    """
    if side % 2 == 0:
        raise BadInput(f"side={side} is even, so that the map would shift; take an odd one")
    frozen = copy.deepcopy(model).requires_grad_(False)
    new, count = with_layers_replaced(frozen, lambda m: AdaFM(m, side) if type(m) is nn.Conv2d else None)
    if not count:
        raise BadInput(f"{type(model).__name__} has no convolution to modulate")
    return new


def set_amount(model: nn.Module, t: float) -> None:
    """Slides every AdaFM filter of a network: 0 is the frozen network, 1 what was learned, both ends may be passed."""
    for module in model.modules():
        if isinstance(module, AdaFM):
            module.amount.fill_(t)
