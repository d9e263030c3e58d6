"""What a program does with memory that it has freed: on Linux it keeps it. Imports no torch: it comes before all else.

The C library gives large blocks back to the system as soon as they are free, and has the system clear them anew, page
by page, when the next layer asks for as much: a tenth of the time of an embedding (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import os
import sys

KEPT = 2**30
"""Bytes: freed memory up to this is kept, and blocks up to this are taken from what is kept. All that a batch needs
besides weights is less, and the most that a process holds at once does not change."""

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``, malloc.h."""


def keep_freed_memory() -> None:
    """Let this process keep up to `KEPT` bytes of freed memory; what the environment sets for the allocator stays.

    It is a matter of the whole process, so programs call it and not models. Without glibc nothing happens.
    """
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, KEPT)
        mallopt(TRIM_THRESHOLD, KEPT)
