"""Chooses how PyTorch's threads wait for each other on this machine."""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

from benchmarks.speed.cases import TORCH
from benchmarks.speed.coordinator import PREPARE_SECONDS, RUN_SECONDS, WorkerFailed
from benchmarks.speed.inputs import filled
from benchmarks.speed.run_case import Bench

# On a busy machine, spinning threads wait for one that does not run: a step of 4 ms took 400 ms. On
# a quiet machine they are faster.
_WAYS: dict[str, dict[str, str]] = {
    "as installed": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
}
_TASK: dict[str, Any] = {"work": "sft", "shape": "tiny", "batch_size": 16}
_ROWS = {"kind": "dense", "count": 16, "length": 128, "prompt": 64}


def faster_waiting(bench: Bench) -> str:
    """Tries both ways on a small step and keeps the faster one for all processes of the bench."""
    task = filled(bench.work, _TASK, _ROWS)
    if bench.missing(TORCH) or isinstance(task, str):
        return "not tried"
    took, others = {}, bench.environments.get(TORCH, {})
    for name, environment in _WAYS.items():
        bench.environments[TORCH] = {**others, **environment}
        with contextlib.closing(bench.start(TORCH, f"waiting-{name}")) as worker:
            try:
                worker.ask({"do": "prepare", "task": task}, PREPARE_SECONDS)
                took[name] = statistics.median(
                    worker.ask({"do": "run", "times": 15}, RUN_SECONDS)["wall"]
                )
            except WorkerFailed:
                continue
    best = min(took, key=lambda name: took[name], default="as installed")
    bench.environments[TORCH] = {**others, **_WAYS[best]}
    told = ", ".join(f"{name} {1000 * seconds:.1f} ms" for name, seconds in took.items())
    return f"{best} ({told})"
