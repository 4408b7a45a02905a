"""What is computed once: tables that depend on sizes only, and, until they change, what depends on parameters.

A tensor counts how often it was written in place, but an optimizer that does its step in one kernel (`fused=True`)
writes without counting. So every step of any optimizer counts too.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def constant(make: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the tensors that a function of numbers and a device last made; a captured graph makes its own."""

    @lru_cache(maxsize=32)
    def kept(*arguments: Any) -> Any:
        with torch.inference_mode(False):
            return make(*arguments)

    @wraps(make)
    def given(*arguments: Any) -> Any:
        return make(*arguments) if torch.compiler.is_compiling() else kept(*arguments)

    return given


class Source:
    """Tensors that something was computed from, as they were then (writing into `tensor.data` goes unseen)."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.seen = [(t.detach(), _written(t)) for t in tensors]  # detached: the memory stays taken, and so its address

    def is_still(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the tensors, in the same memory and unchanged."""
        now = list(tensors)
        return len(now) == len(self.seen) and all(
            t.data_ptr() == then.data_ptr() and _written(t) == state
            for t, (then, state) in zip(now, self.seen, strict=True)
        )


class Kept:
    """What was computed from tensors, for as long as they stay as they are."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: Any = None
        self.source = Source()

    def __call__(self, key: object, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        if key != self.key or not self.source.is_still(tensors):
            with torch.inference_mode(False), torch.no_grad():
                self.key, self.value = key, make()
            self.source = Source(tensors)
        return self.value


def may_keep(module: nn.Module, x: Tensor) -> bool:
    """Whether something computed from the parameters may be kept: eval mode, no gradients, no graph being captured."""
    if module.training or torch.compiler.is_compiling() or x.is_meta:
        return False
    return not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))


def _written(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor was written in place or an optimizer may have moved it."""
    return (0 if tensor.is_inference() else tensor._version), _steps
