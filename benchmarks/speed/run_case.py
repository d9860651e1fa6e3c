"""Runs one case, from its files to its records."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed import coordinator, report
from benchmarks.speed.cases import OURS, TORCH, TUNIX, Case, model_folder
from benchmarks.speed.coordinator import REPOSITORY, Timed, Worker, WorkerFailed
from benchmarks.speed.inputs import filled

MODULES = {
    OURS: "benchmarks.speed.ours",
    TORCH: "benchmarks.speed.torch_peer",
    TUNIX: "benchmarks.speed.tunix_peer",
}
HOW_TO_INSTALL = {
    TORCH: "python -m venv .venv-peers && .venv-peers/bin/pip install -r requirements-peers.txt",
    TUNIX: (
        "python -m venv .venv-peers-jax && "
        ".venv-peers-jax/bin/pip install google-tunix==0.1.7 jax==0.10.2"
    ),
}


@dataclass
class Bench:
    """Everything that all cases share.

    Attributes:
      work: folder of models, rows and logs.
      interpreters: the Python of each tool.
      environments: environment variables of each tool's processes.
      peak_flops: the device's FLOPs a second, once measured; 0 before.
    """

    work: Path
    interpreters: Mapping[str, str]
    environments: dict[str, dict[str, str]] = field(default_factory=dict)
    peak_flops: float = 0.0

    def start(self, tool: str, log: str) -> Worker:
        """Starts a process of a tool."""
        return Worker(
            [self.interpreters[tool], "-m", MODULES[tool]],
            self.work / "logs" / f"{log}.log",
            {"PYTHONPATH": str(REPOSITORY), **self.environments.get(tool, {})},
        )

    def missing(self, tool: str) -> str:
        """The reason why a tool cannot be used; empty if it can."""
        if tool == OURS or Path(self.interpreters[tool]).exists():
            return ""
        return (
            f"{tool} is not installed ({self.interpreters[tool]}); make its environment: "
            f"{HOW_TO_INSTALL[tool]}"
        )

    def make_model(self, task: dict[str, Any]) -> dict[str, Any]:
        """Writes the model of a task; returns the worker's figures, with its ``backend``."""
        folder = model_folder(self.work, task)
        with contextlib.closing(self.start(OURS, f"make-{folder.name}")) as worker:
            described = worker.ask(
                {"do": "prepare", "task": {**task, "work": "make", "folder": str(folder)}},
                coordinator.PREPARE_SECONDS,
            )
        found: dict[str, Any] = described["extra"]
        return found


def run_case(bench: Bench, case: Case) -> list[report.Record]:
    """Runs a case and returns its records; what cannot be measured has a record with the reason."""
    if case.skip:
        return [report.skipped(one, case.skip) for one in case.comparisons]
    reasons: dict[str, str] = {}
    tasks: dict[str, Any] = {}
    for entry in case.entries:
        task = filled(bench.work, entry.task, case.rows)
        if isinstance(task, str):
            return [report.skipped(one, task) for one in case.comparisons]
        tasks[entry.label] = task
        if reason := bench.missing(entry.tool):
            reasons[entry.label] = reason
    needed = [e for e in case.entries if e.label not in reasons and e.task["work"] != "plan"]
    for task in {str(model_folder(bench.work, e.task)): e.task for e in needed}.values():
        if not (model_folder(bench.work, task) / "adapter").exists():
            try:
                bench.make_model(task)
            except WorkerFailed as failure:
                return [report.skipped(one, f"no model: {failure}") for one in case.comparisons]
    workers: dict[str, Worker] = {}
    try:
        for entry in case.entries:
            if entry.label not in reasons:
                log = f"{case.name}-{entry.label}"
                workers[entry.label] = bench.start(entry.tool, log)
        timed: dict[str, Timed] = {}
        for label, found in coordinator.prepare(workers, tasks).items():
            if isinstance(found, str):
                reasons[label] = f"{label}: {found}"
            else:
                timed[label] = found
        for label in case.same[1:]:
            different = coordinator.differences(timed, (case.same[0], label), case.tolerance)
            if different:
                reasons[label] = f"not timed, because the results differ: {different}"
                timed.pop(label, None)
        wanted = {
            label
            for one in case.comparisons
            if one.ours in timed and one.against in timed
            for label in (one.ours, one.against)
        }
        reasons |= coordinator.take_turns(
            {label: worker for label, worker in workers.items() if label in wanted},
            timed,
            case.repetitions,
        )
        of_a_step = {label: one.a_step(case.steps) for label, one in timed.items()}
        return _records(bench, case, of_a_step, reasons)
    finally:
        for worker in workers.values():
            worker.close()


def _records(
    bench: Bench, case: Case, timed: Mapping[str, Timed], reasons: Mapping[str, str]
) -> list[report.Record]:
    for one in timed.values():
        peak = one.described.get("extra", {}).get("peak_flops")
        bench.peak_flops = peak or bench.peak_flops
    found = []
    for comparison in case.comparisons:
        failed = [reasons[x] for x in (comparison.ours, comparison.against) if x in reasons]
        if failed:
            found.append(report.skipped(comparison, "; ".join(failed)))
            continue
        record = report.record_of(comparison, timed)
        flops = timed[comparison.ours].described.get("flops", 0.0)
        if bench.peak_flops and flops:
            seconds = statistics.median(timed[comparison.ours].wall)
            record["flop_utilisation"] = flops / seconds / bench.peak_flops
        found.append(record)
    return found
