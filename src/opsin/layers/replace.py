"""A copy of a network with some of its layers exchanged."""

from collections.abc import Callable
from copy import deepcopy

from torch import nn

Swap = Callable[[nn.Module], nn.Module | None]  # a module to what replaces it, or None to look inside


def with_layers_replaced(model: nn.Module, swap: Swap) -> tuple[nn.Module, int]:
    """A deep copy in which every module that `swap` gives another for is that other one, and how many there are.

    A module that stands in several places is asked for once and replaced in all; what is inside a replaced module is
    not looked at. The new ones are in training or eval mode as the old ones were. The model itself may be replaced.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            new = swap(module)
            done[module] = module if new is None else new.train(module.training)
            if new is None:
                for name, child in module._modules.items():
                    module._modules[name] = None if child is None else visit(child)
        return done[module]

    new = visit(deepcopy(model))
    return new, sum(old is not replaced for old, replaced in done.items())
