"""Peak memory of a forward pass and of a training step.

On CUDA the allocator is asked. On the CPU nobody keeps such a count, so every operator's results are watched: a storage
counts from the operator that returns it until the last tensor on it is gone, which includes what autograd saves for
backward, gradients and optimiser states. Scratch space that a kernel takes and gives back within one operator (such as
an im2col buffer) is not seen; everything that the network itself must hold is.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all live storages that were made inside the `with` block; `peak` is the largest sum.

    base: bytes that were there before (parameters, input); the storages of `known` tensors are these and count once.
    """

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.live: dict[int, weakref.ref] = {}
        self.now = 0
        self.peak = 0
        for tensor in known:
            self._see(tensor)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            return

        def gone(_: weakref.ref) -> None:
            del self.live[key]
            self.now -= size

        self.live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out


def peak_memory(model: nn.Module, inputs: tuple[Tensor, ...], *, training: bool = False) -> int:
    """Peak bytes of one forward pass in eval mode, or of one AdamW training step; parameters and input included.

    A training step is forward in training mode, backward from the mean of all outputs, and the optimiser's step with
    its two moments per parameter. The model's parameters, gradients and mode are as before afterwards.
    """
    step = _training_step if training else _forward
    held = [*model.parameters(), *model.buffers(), *inputs]
    device = next((t.device for t in held), torch.device("cpu"))
    mode = model.training
    state = {name: value.clone() for name, value in model.state_dict().items()} if training else {}
    grads = [parameter.grad for parameter in model.parameters()]
    model.train(training)
    try:
        if device.type == "cuda":
            return _peak_cuda(step, model, inputs, held, device)
        with LiveTensors(held) as memory:
            step(model, inputs)
        return memory.peak
    finally:
        model.train(mode)
        if training:
            model.load_state_dict(state)
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad


def _forward(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        model(*inputs)


def _training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = None
    with torch.enable_grad():
        outputs = [t for t in tree_iter(model(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
        if outputs:
            torch.stack([output.float().mean() for output in outputs]).sum().backward()
    del outputs
    if trained:
        torch.optim.AdamW(trained, lr=0.0).step()


def _peak_cuda(
    step: Callable[[nn.Module, tuple[Tensor, ...]], None],
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    held: list[Tensor],
    device: torch.device,
) -> int:
    step(model, inputs)  # the first call also allocates the libraries' workspaces
    for parameter in model.parameters():
        parameter.grad = None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(model, inputs)
    torch.cuda.synchronize(device)
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}
    return torch.cuda.max_memory_allocated(device) - before + sum(storages.values())
