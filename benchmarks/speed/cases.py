"""The cases as data: programs that run in turns, and which of them are compared how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

OURS, TORCH, TUNIX = "ours", "torch", "tunix"
Measure = Literal["wall", "cpu", "peak"]


@dataclass(frozen=True)
class Entry:
    """A program of a case.

    Attributes:
      label: its name in the case.
      tool: the tool whose worker runs it.
      task: what the worker is asked for, without ``folder`` and ``rows``.
    """

    label: str
    tool: str
    task: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two entries of a case, as a record of ``speed.json``.

    Attributes:
      name: the name of the record.
      ours, against: labels. A ratio is ``against / ours`` (how many times faster we are), or with
        ``lower_is_better`` ``ours / against`` (how much more ours takes).
      measure: wall seconds, CPU seconds or bytes at the peak.
      bar: the least ratio, or with ``lower_is_better`` the greatest; None for no bar.
      times_floor: whether the bar is a multiple of the ``floor`` that the entry ``ours`` reports.
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
      name: the name that ``--only`` takes.
      entries: the programs.
      comparisons: the records.
      rows: the rows that are used, see ``inputs.make_rows``.
      repetitions: number of turns.
      steps: number of batches of a turn; seconds, FLOPs and units are reported for one.
      same: labels whose results must agree before anything is timed.
      tolerance: relative tolerance of the results.
      skip: the reason why the case does not run; its records state it.
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
    """The cases of a machine; a GPU has larger shapes."""
    from benchmarks.speed import cases_cpu, cases_gpu

    return cases_gpu.cases(quick) if backend == "gpu" else cases_cpu.cases(quick)


def dense(count: int, length: int, prompt: int) -> dict[str, Any]:
    """``Case.rows`` of one length."""
    return {"kind": "dense", "count": count, "length": length, "prompt": prompt}


def with_peers(
    name: str, task: dict[str, Any], bars: Mapping[str, float], *, compiled: bool, **fields: Any
) -> Case:
    """A work of ours beside the same work of each peer; their results must agree.

    Args:
      name: of the case.
      task: the task of every tool.
      bars: the bar against each peer.
      compiled: whether peers may compile.
      **fields: others of ``Case``.
    """
    entries = [Entry(OURS, OURS, task)]
    entries += [Entry(tool, tool, {**task, "compile": compiled}) for tool in bars]
    found = [Comparison(f"{name}/{tool}", OURS, tool, bar=bar) for tool, bar in bars.items()]
    return Case(name, tuple(entries), tuple(found), same=(OURS, *bars), **fields)


def of_ours(
    name: str, tasks: Mapping[str, dict[str, Any]], *comparisons: Comparison, **fields: Any
) -> Case:
    """Programs of ours by label.

    Args:
      name: of the case.
      tasks: the task of each label.
      *comparisons: the records.
      **fields: others of ``Case``.
    """
    entries = tuple(Entry(label, OURS, task) for label, task in tasks.items())
    return Case(name, entries, comparisons, **fields)


def curve(name: str, tasks: Mapping[str, dict[str, Any]], **fields: Any) -> Case:
    """Programs of ours, each compared with the first, without bars."""
    first, *others = tasks
    found = [Comparison(f"{name}/{one}", one, first, lower_is_better=True) for one in others]
    return of_ours(name, tasks, *found, **fields)


def score_over_forward(task: dict[str, Any], bar: float, **fields: Any) -> Case:
    """Soft labels beside a forward pass with the gold token's log-softmax."""
    name = f"score_over_forward_{task['shape']}"
    works = ("score", "forward")
    tasks = {work: {"work": work, **task} for work in works}
    comparison = Comparison(name, *works, bar=bar, lower_is_better=True)
    return of_ours(name, tasks, comparison, same=works, **fields)


def folder_name(task: dict[str, Any]) -> str:
    """The name of the folder of a task's model."""
    return task["shape"] + (f"-v{task['vocab']}" if task.get("vocab") else "")


def model_folder(work: Path, task: dict[str, Any]) -> Path:
    """The folder of a task's model."""
    return work / "models" / folder_name(task)
