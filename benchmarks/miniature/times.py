"""Seconds of each stage: a line a start, so that an interrupted demo still adds up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "times.tsv"


@contextmanager
def timed(out: Path, stage: str) -> Iterator[None]:
    """Notes how long the block took, whether or not it succeeded."""
    started = time.monotonic()
    try:
        yield
    finally:
        add_time(out, stage, time.monotonic() - started)


def add_time(out: Path, stage: str, seconds: float) -> None:
    """Adds a line to ``times.tsv``."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / FILE, "a", encoding="utf-8") as file:
        file.write(f"{stage}\t{seconds:.3f}\n")


def read_times(out: Path) -> dict[str, float]:
    """Seconds of each stage over all its starts, in the order of the first."""
    times: dict[str, float] = {}
    if (out / FILE).exists():
        for line in (out / FILE).read_text(encoding="utf-8").splitlines():
            stage, _, seconds = line.partition("\t")
            times[stage] = round(times.get(stage, 0.0) + float(seconds), 3)
    return times
