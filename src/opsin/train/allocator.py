"""Freed memory stays at hand while a processor trains.

Every step of a training allocates what the step before it freed. The GNU C library gives large blocks back to the
system at once and gets them again as pages that the system must clear, which can take as long as the arithmetic
(`benchmarks/allocator.py`). Its thresholds can be moved, for the whole process and for good.
"""

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
SETTINGS = {TRIM_THRESHOLD: 2**31 - 1, MMAP_THRESHOLD: 2**30, TOP_PAD: 2**26}  # bytes


def keep_freed_memory() -> bool:
    """Whether freed memory is kept from now on: on Linux with the GNU C library, unless the user has tuned it.

    What a process holds does not shrink below its peak any more.
    """
    tuned = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" and not tuned else None
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in SETTINGS.items())
