"""Accuracies of benchmarks by sub-task, by task and over tasks, and differences between models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from proxykd_jax.evaluation.measures import mean

# The mode that compares texts of choices, and its score by length.
COMPARED, BY_LENGTH = "loglikelihood", "score_by_length"
# A scored sample: one line of <task>.jsonl.
Sample = Mapping[str, Any]


def accuracy(samples: Sequence[Sample], key: str = "score") -> dict[str, Any]:
    """Share of right samples, its standard error, and properties of the answers.

    Args:
      samples: samples of one task.
      key: which of a sample's scores to use.

    Returns:
      ``accuracy``, ``se`` (None for fewer than two samples), ``n``; ``answered`` and ``finished``,
      the shares of texts that give an answer and that ended by themselves; with several sub-tasks
      ``subtasks`` and ``subtask_mean``, which weights sub-tasks equally.
    """
    result = {
        **_mean([float(sample[key]) for sample in samples]),
        "answered": sum(sample["extracted"] is not None for sample in samples) / len(samples),
        "finished": sum(bool(sample["finished"]) for sample in samples) / len(samples),
    }
    names = sorted({sample["subtask"] for sample in samples})
    if len(names) > 1:
        parts = {
            name: _mean([float(s[key]) for s in samples if s["subtask"] == name]) for name in names
        }
        result["subtasks"] = parts
        result["subtask_mean"] = sum(part["accuracy"] for part in parts.values()) / len(parts)
    return result


def macro_average(tasks: Mapping[str, Mapping[str, Any]], key: str = "accuracy") -> dict[str, Any]:
    """Mean over tasks with equal weights, and its standard error (tasks are independent)."""
    errors = [task["se"] for task in tasks.values()]
    known = all(error is not None for error in errors)
    return {
        key: sum(task[key] for task in tasks.values()) / len(tasks),
        "se": math.sqrt(sum(error**2 for error in errors)) / len(tasks) if known else None,
        "tasks": len(tasks),
    }


def paired_difference(
    first: Sequence[Sample], second: Sequence[Sample], key: str = "score"
) -> dict[str, Any] | None:
    """``first`` minus ``second`` on the items that both have; None if there are none.

    Pairing by item removes the variation from items that are hard for both; the standard error is
    that of the differences.
    """
    others = {sample["id"]: sample for sample in second}
    gaps = [
        float(sample[key]) - float(others[sample["id"]][key])
        for sample in first
        if sample["id"] in others
    ]
    if not gaps:
        return None
    found = _mean(gaps)
    return {"difference": found["accuracy"], "se": found["se"], "n": found["n"]}


def summarise(scored: Mapping[str, Mapping[str, Sequence[Sample]]]) -> dict[str, Any]:
    """Accuracies of each model and their paired differences.

    Args:
      scored: model -> task, or task with "_loglikelihood" -> samples.
    """
    models = {name: _accuracies(tasks) for name, tasks in scored.items()}
    differences = {}
    for first, second in itertools.combinations(scored, 2):
        pairs = {
            task: difference
            for task in scored[first]
            if task in scored[second]
            and (difference := paired_difference(scored[first][task], scored[second][task]))
        }
        generated = {task: pair for task, pair in pairs.items() if not _is_compared(task)}
        if pairs:
            differences[f"{first} - {second}"] = {"tasks": pairs}
        if generated:
            macro = macro_average(generated, "difference")
            differences[f"{first} - {second}"]["macro_average"] = macro
    return {"models": models, "differences": differences}


def _accuracies(tasks: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    generated = {name: accuracy(of) for name, of in tasks.items() if not _is_compared(name)}
    if generated:
        found["generate"] = {"tasks": generated, "macro_average": macro_average(generated)}
    compared = {name: of for name, of in tasks.items() if _is_compared(name)}
    for key, label in (("score", "raw"), (BY_LENGTH, "length_normalised")):
        results = {
            name.removesuffix(f"_{COMPARED}"): accuracy(of, key) for name, of in compared.items()
        }
        if results:
            entry = {"tasks": results, "macro_average": macro_average(results)}
            found.setdefault(COMPARED, {})[label] = entry
    return found


def _is_compared(name: str) -> bool:
    return name.endswith(f"_{COMPARED}")


def described(summary: Mapping[str, Any]) -> list[str]:
    """A summary as lines of text."""
    lines = []
    for name, ways in summary["models"].items():
        tables = {"generate": ways.get("generate")}
        tables |= {f"{COMPARED}, {way}": table for way, table in ways.get(COMPARED, {}).items()}
        for way, table in tables.items():
            rows = {**table["tasks"], "macro average": table["macro_average"]} if table else {}
            for task, found in rows.items():
                error = "" if found["se"] is None else f" +- {100 * found['se']:.2f}"
                count = f", n {found['n']}" if "n" in found else ""
                share = f"{100 * found['accuracy']:.2f}{error}{count}"
                lines.append(f"evaluate: {name:<16} {task:<14} {way}: {share}")
    for pair, found in summary["differences"].items():
        for task, gap in found["tasks"].items():
            error = "" if gap["se"] is None else f" +- {100 * gap['se']:.2f}"
            share = f"{100 * gap['difference']:+.2f}{error}, n {gap['n']}"
            lines.append(f"evaluate: {pair} {task}: {share}")
    return lines


def _mean(values: Sequence[float]) -> dict[str, Any]:
    share, error = mean(np.array(values))
    return {"accuracy": share, "se": error, "n": len(values)}
