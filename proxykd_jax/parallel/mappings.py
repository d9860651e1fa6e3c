"""Makes room for compiled programs.

Linux limits a process's memory mappings (65,530 by default), and a program compiled for a CPU keeps
some hundreds: a training step of 6 layers about 500. When none is left, XLA does not raise an error
but aborts. Programs for GPUs and TPUs keep none.
"""

from __future__ import annotations

from pathlib import Path

import jax

_ALLOWED = Path("/proc/sys/vm/max_map_count")
_MAPPINGS = Path("/proc/self/maps")


def make_room() -> bool:
    """Drops this process's compiled programs if three quarters of its mappings are in use.

    Programs that are called again are compiled again, or read from the compilation cache. Call this
    where a stage is about to compile another shape.

    Returns:
      Whether programs were dropped.
    """
    try:
        allowed = int(_ALLOWED.read_text())
        taken = _MAPPINGS.read_bytes().count(b"\n")
    except (OSError, ValueError):  # not Linux
        return False
    if taken < allowed * 3 // 4:
        return False
    jax.clear_caches()
    return True
