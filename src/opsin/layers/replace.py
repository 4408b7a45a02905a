"""A copy of a network with some of its layers exchanged."""

import copy
from collections.abc import Callable

from torch import nn

Swap = Callable[[nn.Module], nn.Module | None]


def with_layers_replaced(model: nn.Module, swap: Swap) -> tuple[nn.Module, int]:
    """A deep copy in which every module that `swap` gives another for is that other one, and how many there are.

    A module that stands in several places is asked for once and replaced in all; what is inside a replaced module is
    not looked at. The model itself may be the module that is replaced.
    """
    holder = nn.ModuleDict({"model": copy.deepcopy(model)})
    made: dict[int, nn.Module | None] = {}
    kept: list[nn.Module] = []  # the originals stay alive, so that no identity is given twice

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) not in made:
                kept.append(child)
                made[id(child)] = swap(child)
                if made[id(child)] is None:
                    visit(child)
            if (new := made[id(child)]) is not None:
                parent._modules[name] = new

    visit(holder)
    return holder["model"], sum(new is not None for new in made.values())
