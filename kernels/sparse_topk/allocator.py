"""What the C library does with the memory of freed tensors. No op calls this, because it changes
the whole process: a program that trains on a CPU asks for it."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep the memory of freed tensors in the process, for the next ones.

    By default glibc maps each large tensor afresh and unmaps it when freed, and Linux then clears
    its pages one by one at the first touch, which takes a quarter of a training step. Afterwards
    freed memory stays with the process (measured: 6 % more at its peak).

    Returns whether it took effect: False if the C library is not glibc; nothing changes then.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
