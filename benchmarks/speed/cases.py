"""What is measured, as data: programs that run in turns, and which of them are compared how."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

OURS, TORCH, TUNIX = "ours", "torch", "tunix"
Measure = Literal["wall", "cpu", "peak"]


@dataclass(frozen=True)
class Entry:
    """One program of a case.

    Attributes:
      label: its name in the case.
      tool: whose worker runs it.
      task: what the worker is asked for; ``folder`` and ``rows`` are filled in.
    """

    label: str
    tool: str
    task: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two entries of a case, as a record of ``speed.json``.

    Attributes:
      name: of the record.
      ours, against: labels. A ratio is ``against / ours`` (how many times faster we are), or with
        ``lower_is_better`` ``ours / against`` (how much more ours takes).
      measure: wall seconds, CPU seconds or bytes at the peak.
      bar: the least ratio, or with ``lower_is_better`` the greatest; None for none.
      times_floor: the bar is so many times the ``floor`` that the entry ``ours`` tells.
    """

    name: str
    ours: str
    against: str
    measure: Measure = "wall"
    bar: float | None = None
    lower_is_better: bool = False
    times_floor: bool = False


@dataclass(frozen=True)
class Case:
    """Programs that take turns.

    Attributes:
      name: what ``--only`` selects.
      entries: the programs.
      comparisons: the records that come of it.
      rows: what is measured on, see ``inputs.make_rows``.
      repetitions: turns.
      steps: batches of a turn, as ``rows`` has them; seconds, FLOPs and units are told of one.
      same: labels whose results must agree before anything is timed.
      tolerance: relative, of the results.
      skip: why the case does not run; its records say so.
    """

    name: str
    entries: tuple[Entry, ...]
    comparisons: tuple[Comparison, ...]
    rows: dict[str, Any] = field(default_factory=dict)
    repetitions: int = 5
    steps: int = 1
    same: tuple[str, ...] = ()
    tolerance: float = 2e-3
    skip: str = ""


def all_cases(backend: str, quick: bool) -> list[Case]:
    """The cases of a machine: a GPU has larger shapes."""
    from benchmarks.speed import cases_cpu, cases_gpu

    return cases_gpu.cases(quick) if backend == "gpu" else cases_cpu.cases(quick)


def dense(count: int, length: int, prompt: int) -> dict[str, Any]:
    """``Case.rows`` of one length."""
    return {"kind": "dense", "count": count, "length": length, "prompt": prompt}


def peers(
    work: str, task: dict[str, Any], tools: tuple[str, ...], compiled: bool
) -> tuple[Entry, ...]:
    """The same work for ours and for each peer."""
    entries = [Entry(OURS, OURS, {"work": work, **task})]
    for tool in tools:
        entries.append(Entry(tool, tool, {"work": work, "compile": compiled, **task}))
    return tuple(entries)


def against_peers(name: str, bars: dict[str, float]) -> tuple[Comparison, ...]:
    """A record for each peer."""
    return tuple(Comparison(f"{name}/{tool}", OURS, tool, bar=bar) for tool, bar in bars.items())


def score_over_forward(
    task: dict[str, Any], rows: dict[str, Any], bar: float, repetitions: int, steps: int
) -> Case:
    """Soft labels beside a forward pass with the gold token's log-softmax; ``rows`` are those of
    all steps of a turn."""
    name = f"score_over_forward_{task['shape']}"
    return Case(
        name=name,
        entries=tuple(Entry(work, OURS, {"work": work, **task}) for work in ("score", "forward")),
        comparisons=(Comparison(name, "score", "forward", bar=bar, lower_is_better=True),),
        rows=rows,
        repetitions=repetitions,
        steps=steps,
        same=("score", "forward"),
    )


def folder_name(task: dict[str, Any]) -> str:
    """Where the model of a task is kept, below the work folder."""
    return task["shape"] + (f"-v{task['vocab']}" if task.get("vocab") else "")


def model_folder(work: Path, task: dict[str, Any]) -> Path:
    """The same, whole."""
    return work / "models" / folder_name(task)
