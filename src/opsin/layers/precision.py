"""Parts of a network that mixed precision leaves alone."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: str) -> AbstractContextManager:
    """Operators inside compute in the types that they are given. device: a type of device, "cpu" or "cuda".

    Nothing where autocast is off anyway, so that captured graphs stay plain.
    """
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()
