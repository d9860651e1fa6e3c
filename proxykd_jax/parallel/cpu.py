"""The CPU that this process runs on: its cores and their caches."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_CORES = Path("/sys/devices/system/cpu")
_USUAL = 1 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # missing on some systems
    return tuple(range(os.cpu_count() or 1)) if affinity is None else tuple(sorted(affinity(0)))


@functools.cache
def l2_cache_bytes() -> int:
    """Bytes of these cores' second-level caches together; 1 MiB per core if unknown."""
    return _l2_cache_bytes(_CORES, cores())


def _l2_cache_bytes(folder: Path, numbers: tuple[int, ...]) -> int:
    found: dict[str, int] = {}  # keyed by the cores that share a cache
    for number in numbers:
        try:
            caches = sorted((folder / f"cpu{number}/cache").glob("index*"))
            second = next(c for c in caches if (c / "level").read_text().strip() == "2")
            size = (second / "size").read_text().strip()
            shared_by = (second / "shared_cpu_list").read_text().strip()
            found[shared_by] = int(size[:-1]) * _UNITS[size[-1]]
        except (OSError, StopIteration, ValueError, KeyError, IndexError):
            return _USUAL * len(numbers)
    return sum(found.values())
