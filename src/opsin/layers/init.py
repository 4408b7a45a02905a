"""Weight initialisers."""

from torch import nn


def init_weights_(model: nn.Module, std: float = 0.02) -> None:
    """Truncated normal of `std` for every convolution and linear layer, zero biases (the modern backbone's default)."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
