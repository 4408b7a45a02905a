"""A copy of a network with some of its layers exchanged."""

from collections.abc import Callable
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

Swap = Callable[[nn.Module], nn.Module | None]  # a module to what replaces it, or None to look inside


def with_layers_replaced(model: nn.Module, swap: Swap) -> tuple[nn.Module, int]:
    """A deep copy in which every module that `swap` gives another for is that other one, and how many there are.

    A module that stands in several places is asked for once and replaced in all; what is inside a replaced module is
    not looked at. The new ones are in training or eval mode, on the device and of the precision of the old ones. The
    model itself may be replaced.
    """
    done: dict[nn.Module, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if module not in done:
            new = _swapped(module, swap)
            done[module] = module if new is None else new
            if new is None:
                for name, child in module._modules.items():
                    module._modules[name] = None if child is None else visit(child)
        return done[module]

    new = visit(deepcopy(model))
    return new, sum(old is not replaced for old, replaced in done.items())


def _swapped(old: nn.Module, swap: Swap) -> nn.Module | None:
    """What replaces a module, on the device and in the type of its first tensor; complex numbers as complex ones."""
    like = next((t for t in chain(old.parameters(), old.buffers()) if t.is_floating_point() or t.is_complex()), None)
    new = swap(old)
    if new is None:
        return None
    if like is not None:
        device, real = like.device, like.dtype.to_real()
        wide = torch.promote_types(real, torch.complex64)

        def moved(tensor: Tensor) -> Tensor:
            kind = wide if tensor.is_complex() else real if tensor.is_floating_point() else tensor.dtype
            return tensor.to(device, kind)

        new._apply(moved)
    return new.train(old.training)
