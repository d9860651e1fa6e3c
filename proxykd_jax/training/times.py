"""How long the stages of a run took, and on which machine: ``times.jsonl``.

Each line is one attempt at a stage: ``{stage, ended, seconds, host, processes, device, devices}``.
``ended`` is ``finished`` or ``stopped``. A killed process leaves no line, so its time is not
counted. A stage that was finished before is not an attempt.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import read_lines
from proxykd_jax.peers import count, is_first

FILE = "times.jsonl"


@contextlib.contextmanager
def timed(run: Path, stage: str, *, on_devices: bool = True) -> Iterator[None]:
    """Adds a line for the time within the block, also if the block raises an exception.

    Args:
      run: the run's folder.
      stage: the command that works.
      on_devices: whether the stage computes on devices; then their kind and number are stored.
    """
    begun, ended = time.monotonic(), "stopped"
    try:
        yield
        ended = "finished"
    finally:
        if is_first():
            line = {"stage": stage, "ended": ended, "seconds": time.monotonic() - begun}
            _append(run / FILE, {**line, **_machine(on_devices)})


def _machine(on_devices: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"host": platform.node(), "processes": count()}
    if on_devices:
        import jax

        found |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count()}
    return found


def _append(path: Path, line: dict[str, Any]) -> None:
    # Missing times do not fail a stage that has done its work.
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_times(run: Path) -> list[dict[str, Any]]:
    """The lines of a run; lines that a killed process left half written are left out."""
    return [
        line
        for line in read_lines(run / FILE)
        if isinstance(line, dict) and isinstance(line.get("seconds"), int | float)
    ]
