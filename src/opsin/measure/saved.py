"""What autograd keeps between forward and backward."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def saved_bytes(compute: Callable[[], Any], known: Iterable[Tensor] = ()) -> int:
    """Bytes that `compute()` leaves with autograd for backward, each storage once.

    known: tensors that exist anyway, such as parameters and the input, and do not count.
    """
    here = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, Tensor] = {}  # the tensors are held, so that no storage's name is given to a second one

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = compute()
    total = sum(t.untyped_storage().nbytes() for storage, t in kept.items() if storage not in here)
    del result
    return total
