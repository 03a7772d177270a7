"""What the C library does with memory that a step has freed: keep it, for the next step asks for the same again.

By itself glibc hands the top of the heap back after every backward pass, and the next step pays for each of its pages
once more: a tenth to a fifth of the time of a small model's step on a CPU. A worker that builds shards does the same
from one slice to the next.
"""

from __future__ import annotations

import ctypes
import functools
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt (malloc.h)."""
_NEVER, _LARGEST_ON_HEAP = 2**31 - 1, 32 << 20
"""Bytes. 32 MiB is the most that glibc takes; what is larger, such as a checkpoint's buffers, goes back when freed."""
_ASKED_BY_USER = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> bool:
    """Tell glibc so. False where the C library has no such call, or the user has told it something else."""
    if any(name in os.environ for name in _ASKED_BY_USER):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
