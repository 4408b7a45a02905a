"""Where a network lies."""

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """The device of its first parameter or buffer; the CPU where it has none."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
