"""What recipes share that add a penalty on the parameters to what is minimised.

It does not depend on the batch, so its gradient is added to that of the task after the backward pass, whatever the
task; on several devices it is the same on each. Where the gradients of several batches are added up before a step, it
is divided by their number, as the losses are.
"""

import torch
from jaxtyping import Float
from lightning import LightningModule, Trainer
from torch import Tensor, nn

from opsin.errors import BadInput
from opsin.recipes import Recipe


class Penalty(Recipe):
    """Adds weight * penalty(model) to what is minimised. Raises BadInput for a negative weight."""

    def __init__(self, weight: float):
        super().__init__()
        if weight < 0:
            raise BadInput(f"the weight of {type(self).__name__} is 0 or more, not {weight}")
        self.weight = weight

    def penalty(self, model: nn.Module) -> Float[Tensor, ""]:
        """The penalty of a network, of which autograd takes the gradient."""
        raise TypeError(f"{type(self).__name__} does not implement penalty()")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weight = self.weight / getattr(trainer, "accumulate_grad_batches", 1)
        if weight > 0:
            with torch.enable_grad():
                (weight * self.penalty(getattr(pl_module, "model", pl_module))).backward()
