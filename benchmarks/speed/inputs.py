"""The rows of a case, as files that all workers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.speed.cases import model_folder
from benchmarks.speed.rows import Rows, corpus_rows, dense_rows, mixed_rows
from benchmarks.speed.shapes import shape_of


def make_rows(work: Path, task: dict[str, Any], wanted: dict[str, Any]) -> Path | str:
    """Makes the file with the rows of a task, if it is not there; returns it, or why there is none.

    Args:
      work: folder of this run's inputs.
      task: its shape gives the vocabulary.
      wanted: ``kind`` is ``dense`` (``count``, ``length``, ``prompt``), ``mixed`` (``count``,
        ``prompts``, ``answers``: shortest and longest) or ``corpus`` (``corpus``, ``count``,
        ``max_length``).
    """
    vocab = shape_of(task).vocab
    name = "-".join([str(vocab), *(f"{key}={value}" for key, value in wanted.items())])
    path = work / "rows" / (name.translate(str.maketrans(" ()'", "____")) + ".npz")
    if path.exists():
        return path
    kind = wanted["kind"]
    found: Rows | str
    if kind == "dense":
        found = dense_rows(wanted["count"], wanted["length"], wanted["prompt"], vocab)
    elif kind == "mixed":
        found = mixed_rows(wanted["count"], wanted["prompts"], wanted["answers"], vocab)
    else:
        found = corpus_rows(wanted["corpus"], wanted["count"], wanted["max_length"], vocab)
    if isinstance(found, str):
        return found
    if len(found) < task.get("batch_size", 1):
        return f"{wanted} gives {len(found)} rows, fewer than a batch of {task['batch_size']}."
    path.parent.mkdir(parents=True, exist_ok=True)
    found.save(path)
    return path


def filled(work: Path, task: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any] | str:
    """The task with the folder of its model and the file of its rows, or why it cannot run."""
    wanted = task.get("rows") or rows
    full = {**task, "folder": str(model_folder(work, task))}
    if not wanted:
        return full
    path = make_rows(work, task, wanted)
    if isinstance(path, str):
        return path
    return {**full, "rows": str(path)}
