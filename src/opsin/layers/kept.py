"""When what was computed from parameters may no longer be used.

A tensor counts how often it was written in place, but an optimizer that does its step in one kernel (`fused=True`)
writes without counting. So every step of any optimizer counts too.
"""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count(*_: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count)


def written(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor was written in place or an optimizer may have moved it; not when `tensor.data` was."""
    return (0 if tensor.is_inference() else tensor._version), _steps
