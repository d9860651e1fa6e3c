"""What a worker answers: JSON lines on its standard output, one for each line that it reads.

    {"do": "prepare", "task": {...}}  ->  {"results": {...}, "settings": [...], ...}
    {"do": "run", "times": 3}         ->  {"wall": [...], "cpu": [...], "peak_bytes": ...}
    {"do": "stop"}                    ->  nothing

A mistake is ``{"error": "..."}``. Whatever a library prints goes to the standard error.
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
# Seconds of a run that is not repeated to choose between ways.
_LONG = 30.0


@dataclass(frozen=True)
class Program:
    """Work that is ready to be timed.

    Attributes:
      run: does it once, and returns when all of it is done.
      results: what is compared with the other tools' before anything is timed.
      settings: what was tried, each with its ``name`` and ``seconds`` (or ``error``).
      units: what a run makes (answer tokens, drawn tokens, ...), for a rate.
      flops: of a run, counted from the shapes; 0 where nobody asks.
      peak: most bytes of the device since the last call; None for the process's own memory.
      extra: figures for the record.
    """

    run: Run
    results: dict[str, float] = field(default_factory=dict)
    settings: list[dict[str, Any]] = field(default_factory=list)
    units: float = 0.0
    flops: float = 0.0
    peak: Callable[[], int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def best_of(ways: Mapping[str, Run]) -> tuple[Run, list[dict[str, Any]]]:
    """The fastest of several ways of doing one thing, and what each took.

    Each runs once to be compiled and warm, then twice, or once if it takes half a minute or half as
    long again as the best before it; the smaller time counts. One that fails is listed with what it
    said.

    Raises:
      RuntimeError: all fail.
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
    """Bytes of ``VmHWM`` (the most so far) or ``VmRSS`` (now); 0 where Linux does not tell."""
    try:
        with open("/proc/self/status") as file:
            lines = [line.split() for line in file if line.startswith(key + ":")]
    except OSError:
        return 0
    return int(lines[0][1]) * 1024 if lines else 0


def forget_peak() -> None:
    """``VmHWM`` begins anew."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass  # the peak then is that of the whole process, for every tool alike


# --- the worker's loop ----------------------------------------------------------------------------


def serve(prepare: Callable[[dict[str, Any]], Program]) -> int:
    """Answers until told to stop, or until nobody asks any more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not look like an answer
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
