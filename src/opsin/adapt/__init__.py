"""Parameter-efficient fine-tuning. The room is also the verb `opsin.adapt(...)`."""

from typing import Protocol, runtime_checkable

from torch import nn

from opsin._verbs import make_callable


@runtime_checkable
class Adapter(Protocol):
    """The contract of the room.

    `adapt` adds the adapter's parameters to a model in place, freezes all others (the classifier may stay trainable)
    and returns it; `merge` folds them into plain weights, as far as the method allows, leaving the output unchanged.
    """

    def adapt(self, model: nn.Module) -> nn.Module: ...
    def merge(self, model: nn.Module) -> nn.Module: ...


make_callable(__name__)
