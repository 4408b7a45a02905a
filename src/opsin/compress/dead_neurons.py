"""How many ReLUs are dead: the meter of AP (Liu et al. 2022, arXiv:2212.06145, section 3).

A unit is a ReLU's output at one channel and position. For an input it is dead if its output is 0. It is dead for good
(static) if no path of weights that are left leads to it from the input; otherwise it is dead for this input (dynamic):

    dynamic rate = mean over inputs of (dead - static dead) / units
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opsin.compress.importance import path_network, prunable
from opsin.compress.quantiser import CONVOLUTIONS, PackedLayer, weight_of
from opsin.errors import BadInput
from opsin.layers.device import device_of

aten = torch.ops.aten
RELUS = (aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_)


@dataclass(frozen=True)
class DeadRates:
    """Shares of all ReLU units of a network, averaged over the inputs."""

    dynamic: float
    static: float
    units: int  # per input


class _Relus(TorchDispatchMode):
    """Notes for every ReLU that runs where its output is 0; ReLU6 (hardtanh from 0) counts, other clipping does not."""

    def __init__(self) -> None:
        super().__init__()
        self.zeros: list[Bool[Tensor, "n ..."]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket
        if name in RELUS and not (name in (aten.hardtanh, aten.hardtanh_) and (len(args) < 2 or args[1] != 0)):
            self.zeros.append((out == 0).flatten(1))
        return out


def zeros_of(model: nn.Module, images: Tensor) -> Bool[Tensor, "n units"]:
    """Which ReLU units are 0 for each input, in the order in which they run. Raises BadInput without any ReLU."""
    with torch.no_grad(), _Relus() as seen:
        model(images.to(device_of(model)))
    if not seen.zeros:
        raise BadInput("the network applies no ReLU, so there are no dead ones to count")
    return torch.cat(seen.zeros, 1)


def unpacked(model: nn.Module) -> nn.Module:
    """A copy in which every layer that packs its weights, such as a sparse one, is PyTorch's own, without a bias."""
    net = deepcopy(model)
    for name, module in tuple(net.named_modules()):
        if name and isinstance(module, PackedLayer):
            net.set_submodule(name, plain(module))
    return net


def plain(layer: PackedLayer) -> nn.Module:
    """The convolution or linear layer that was packed, without a bias."""
    weight = layer.weight().detach()
    new: nn.Module = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    if isinstance(layer.compute, partial):
        geometry = layer.compute.keywords
        kind = next(kind for kind, function in CONVOLUTIONS.items() if function is layer.compute.func)
        inputs = weight.shape[1] * geometry["groups"]
        new = kind(inputs, len(weight), weight.shape[2:], bias=False, device="meta", **geometry)
    new.weight = nn.Parameter(weight)
    return new


def unreachable(model: nn.Module, example: Float[Tensor, "1 c h w"]) -> Bool[Tensor, " units"]:
    """Units to which no path of non-zero weights leads. Averages instead of sums keep deep networks in range."""
    model, weights = unpacked(model), {}
    for name, layer in prunable(model).items():
        alive = (weight_of(layer).detach() != 0).double()
        fan = alive.flatten(1).sum(1).clamp_min(1)
        weights[name] = alive / fan.view(-1, *[1] * (alive.ndim - 1))
    return zeros_of(path_network(model, weights), torch.ones_like(example[:1], dtype=torch.float64))[0]


def dead_rates(model: nn.Module, images: Float[Tensor, "n c h w"], batch: int = 250) -> DeadRates:
    """Rates over some inputs, in eval mode; pruned weights are those that are exactly 0.

    Raises BadInput where the network applies no ReLU.
    """
    training = model.training
    model.eval()
    lost = unreachable(model, images)
    dead, static = 0.0, 0.0
    for part in images.split(batch):
        zeros = zeros_of(model, part)
        dead += float((zeros & ~lost).double().mean(1).sum())
        static += float((zeros & lost).double().mean(1).sum())
    model.train(training)
    return DeadRates(dead / len(images), static / len(images), len(lost))


def as_numbers(rates: DeadRates) -> Mapping[str, float]:
    return {"dynamic": rates.dynamic, "static": rates.static}
