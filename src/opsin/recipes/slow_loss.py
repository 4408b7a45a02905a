"""Slow loss: the loss of the task plus a weight times the local error of the network's slow networks.

Part of how Terminator is trained (Zhang 2024, arXiv:2401.17948; see `hyperzzw`): besides the task, the distance of the
blocks' hyper-kernels from each other teaches the slow networks that draw them. Any network whose modules have a method
`slow_loss()` can be trained so. The weight is chosen here, as the paper's is not known.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.recipes.penalty import Penalty


class SlowLoss(Penalty):
    """Adds weight * slow_loss() to what is minimised.

    Raises BadInput for a negative weight, and at the first step where the network has no slow loss.
    """

    def __init__(self, weight: float = 0.01):
        super().__init__(weight)

    def penalty(self, model: nn.Module) -> Float[Tensor, ""]:
        """The sum over the modules that have a slow loss. Raises BadInput where there are none."""
        losses = [module.slow_loss() for module in model.modules() if hasattr(module, "slow_loss")]
        if not losses:
            raise BadInput("the recipe slow_loss is for networks with slow networks, such as terminator; leave it out")
        return torch.stack(losses).sum()
