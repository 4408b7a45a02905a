"""Loops in C++, for processors, where PyTorch has no operator that does it in one pass.

Nothing is compiled at installation. Where a first call finds a C++ compiler (CXX, c++, g++ or clang++), it takes a
second to compile the file, and the library stays in the user's cache; where there is none, or OPSIN_NATIVE=0 is set,
the same is done with PyTorch's operators. Sources lie beside the operators that use them, and export plain C functions;
what they share is in native.h, and headers of their own beside them.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from shutil import which

from torch import Tensor, float32, is_grad_enabled
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.compiler import is_compiling
from torch.jit import is_tracing

KINDS = {"p": ctypes.c_void_p, "l": ctypes.c_long, "f": ctypes.c_float}
HEADER = Path(__file__).with_suffix(".h")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp-simd", "-std=c++17", "-shared", "-fPIC")


def takes(x: Tensor) -> bool:
    """Whether a loop may read this tensor's memory: float32 on a processor, and nobody records what is done to it."""
    return (
        type(x) is Tensor
        and x.dtype is float32
        and x.is_cpu
        and not (x.requires_grad and is_grad_enabled())
        and not (is_compiling() or is_tracing() or is_functorch_wrapped_tensor(x))
    )


@cache
def loop(source: str, name: str, arguments: str) -> Callable[..., None] | None:
    """A function of a C++ file, or None where it cannot be had. arguments: tensor's memory p, long l, float f."""
    found = library(Path(source))
    if found is None:
        return None
    function = found[name]
    function.argtypes = [KINDS[kind] for kind in arguments]
    function.restype = None
    return function


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The compiled file, or None where it cannot be had."""
    found = (which(name) for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name)
    compiler = next(filter(None, found), None)
    if compiler is None or os.name != "posix" or os.environ.get("OPSIN_NATIVE") == "0":  # elsewhere a long has 32 bits
        return None
    files = [file.read_bytes() for file in (source, HEADER, *sorted(source.parent.glob("*.h")))]
    made_of = repr((files, FLAGS, threading(), compiler, _processor())).encode()
    try:
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "opsin"
        path = place / f"{source.stem}-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
        if not path.is_file():
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or "").splitlines()
        reason = next((line for line in lines if "error" in line), str(error))
        warnings.warn(f"{source.name} was not compiled ({reason}); PyTorch's operators do its work. OPSIN_NATIVE=0 "
                      "silences this.", stacklevel=2)  # fmt: skip
        return None


def threading() -> tuple[str, ...]:
    """The flag for threads, where they are those that PyTorch has; others would fight those, so elsewhere there is one.

    That is where PyTorch has loaded its OpenMP by the name that a compiler links.
    """
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD)
    except (OSError, AttributeError):
        return ()
    return ("-fopenmp",)


def _compile(compiler: str, source: Path, path: Path) -> None:
    """In a folder of its own, then moved into place: other processes see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, *threading(), f"-I{HEADER.parent}", str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        made.replace(path)


def _processor() -> str:
    """What `-march=native` depends on, for a home directory that several machines share."""
    info = Path("/proc/cpuinfo")
    flags = (line for line in info.read_text().splitlines() if line.startswith("flags")) if info.is_file() else iter(())
    return platform.machine() + platform.processor() + next(flags, "")
