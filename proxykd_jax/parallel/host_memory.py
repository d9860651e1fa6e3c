"""How the C library keeps memory, where arrays live in the host's."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory() -> bool:
    """Lets this process keep large blocks that it frees, for the next array.

    glibc asks the system for fresh pages for each block above 32 MiB and returns them when it is
    freed. XLA's temporaries on a CPU are such blocks, made anew for each step, and the first touch
    of each page costs more than writing it: adding 1 to an array of 64 MiB took 33 ms with fresh
    pages and 11 with kept ones (two cores, Linux 6, pages of 4 KiB).

    Returns:
      Whether the C library was told; nothing is done but on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
