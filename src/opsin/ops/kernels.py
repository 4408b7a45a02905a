"""When a Triton kernel runs. Kernels live in files of their own, `*_triton.py`, which alone import Triton."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

from torch import Tensor, compiler, cuda

from opsin.errors import BadInput


def kernel_wanted(x: Tensor) -> bool:
    """Whether `backend="auto"` takes the kernel: a CUDA tensor, Triton at hand, and no graph being captured."""
    return x.is_cuda and not compiler.is_compiling() and find_spec("triton") is not None


def require_kernel(x: Tensor) -> None:
    """Raises BadInput where `backend="triton"` cannot run: no Triton, or a CPU tensor outside Triton's interpreter."""
    if find_spec("triton") is None:
        raise BadInput('backend="triton" needs the package triton; install it, or take backend="auto"')
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise BadInput('backend="triton" needs a CUDA tensor (or TRITON_INTERPRET=1 set from the start)')


def launching_on(x: Tensor) -> AbstractContextManager[object]:
    """Makes a CUDA tensor's device the current one, which is where Triton launches; nothing for other tensors."""
    return cuda.device(x.device) if x.is_cuda else nullcontext()
