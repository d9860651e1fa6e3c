"""Room for compiled programs.

Linux allows a process so many mappings of memory (65,530 unless it is told otherwise), and a
program compiled for a CPU keeps some hundreds of them: a training step of 6 layers about 500. With
none left XLA does not raise, it aborts. Programs of GPUs and TPUs keep none.
"""

from __future__ import annotations

from pathlib import Path

import jax

_ALLOWED = Path("/proc/sys/vm/max_map_count")
_MAPPINGS = Path("/proc/self/maps")


def make_room() -> bool:
    """Forgets this process's compiled programs if three quarters of its mappings are taken.

    Those that are called again are compiled again, or read from the compilation cache. To be called
    where a stage is about to compile another shape.

    Returns:
      Whether they were forgotten.
    """
    try:
        allowed = int(_ALLOWED.read_text())
        taken = _MAPPINGS.read_bytes().count(b"\n")
    except (OSError, ValueError):  # another system
        return False
    if taken < allowed * 3 // 4:
        return False
    jax.clear_caches()
    return True
