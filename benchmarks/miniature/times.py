"""The seconds of each stage. Each start adds a line, so the sums hold after an interrupt."""

from __future__ import annotations

from pathlib import Path

FILE = "times.tsv"


def add_time(out: Path, stage: str, seconds: float) -> None:
    """Adds a line to ``times.tsv``."""
    with open(out / FILE, "a", encoding="utf-8") as file:
        file.write(f"{stage}\t{seconds:.0f}\n")


def read_times(out: Path) -> dict[str, float]:
    """The seconds of each stage over all its starts, in the order of the first starts."""
    times: dict[str, float] = {}
    if (out / FILE).exists():
        for line in (out / FILE).read_text(encoding="utf-8").splitlines():
            stage, _, seconds = line.partition("\t")
            times[stage] = times.get(stage, 0.0) + float(seconds)
    return times
