"""A worker answers each line that it reads by a line of JSON on its standard output.

    {"do": "prepare", "task": {...}}  ->  {"results": {...}, "settings": [...], ...}
    {"do": "run", "times": 3}         ->  {"wall": [...], "cpu": [...], "peak_bytes": ...}
    {"do": "stop"}                    ->  nothing

A mistake is answered by ``{"error": "..."}``. What libraries print goes to the standard error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Run = Callable[[], object]
_LONG = 30.0  # A run that takes so many seconds is not repeated to choose between ways.


@dataclass(frozen=True)
class Program:
    """Work that is ready to be timed.

    Attributes:
      run: does the work once, and returns when all of it is done.
      results: figures that are compared with those of other tools before anything is timed.
      settings: the settings that were tried, each with ``name`` and ``seconds`` (or ``error``).
      units: number of units that a run makes (answer tokens, drawn tokens), for a rate.
      flops: FLOPs of a run, counted from the shapes; 0 where they are not needed.
      peak: returns the most bytes of the device since its last call; None for the memory of the
        process.
      extra: further figures for the record.
    """

    run: Run
    results: dict[str, float] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)
    units: float = 0.0
    flops: float = 0.0
    peak: Callable[[], int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def best_of(ways: Mapping[str, Run]) -> tuple[Run, list[dict[str, Any]]]:
    """Chooses the fastest of several ways of doing one thing; returns it, and what each took.

    Each way runs once to be compiled and warm, and then twice. It runs only once if it takes half a
    minute, or half as long again as the best before it. The smaller time counts. A way that fails
    is listed with its error.

    Raises:
      RuntimeError: all ways fail.
    """
    found: list[dict[str, Any]] = []
    least = math.inf
    for name, run in ways.items():
        try:
            run()
            seconds = _seconds(run) if len(ways) > 1 else None
            if seconds is not None and seconds < 1.5 * least:
                if seconds < _LONG:
                    seconds = min(seconds, _seconds(run))
                least = min(least, seconds)
            found.append({"name": name, "seconds": seconds})
        except Exception as error:
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            found.append({"name": name, "error": lines[0][:300]})
    fit = [one for one in found if "error" not in one]
    if not fit:
        raise RuntimeError("; ".join(f"{one['name']}: {one['error']}" for one in found))
    best = min(fit, key=lambda one: one["seconds"] or 0.0)
    best["chosen"] = True
    return ways[best["name"]], found


def _seconds(run: Run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


# --- memory of this process -----------------------------------------------------------------------


def memory(key: str) -> int:
    """The bytes of ``VmHWM`` (the most so far) or ``VmRSS`` (now); 0 where they are not known."""
    try:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith(key + ":")]
    except OSError:
        return 0
    return int(lines[0][1]) * 1024 if lines else 0


def forget_peak() -> None:
    """Resets ``VmHWM``."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # The peak is then that of the whole process, for every tool alike.


# --- the worker's loop ----------------------------------------------------------------------------


def serve(prepare: Callable[[dict[str, Any]], Program]) -> int:
    """Answers requests until one says stop, or until no more come."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What libraries print must not look like an answer.
    base = memory("VmRSS")
    program: Program | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "stop":
            break
        try:
            if request["do"] == "prepare":
                program = prepare(request["task"])
                answer = _described(program, base)
            else:
                assert program is not None, "run before prepare"
                answer = _timed(program, request["times"])
        except Exception as error:
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {text[0][:500]}"}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _described(program: Program, base: int) -> dict[str, Any]:
    return {
        "results": program.results,
        "settings": program.settings,
        "units": program.units,
        "flops": program.flops,
        "extra": program.extra,
        "base_bytes": 0 if program.peak else base,
    }


def _timed(program: Program, times: int) -> dict[str, Any]:
    if program.peak is None:
        forget_peak()
    else:
        program.peak()
    wall, cpu = [], []
    for _ in range(times):
        started, burnt = time.perf_counter(), time.process_time()
        program.run()
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - burnt)
    peak = memory("VmHWM") if program.peak is None else program.peak()
    return {"wall": wall, "cpu": cpu, "peak_bytes": peak}
