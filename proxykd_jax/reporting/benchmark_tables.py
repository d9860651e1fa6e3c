"""Accuracies on the six benchmarks, in the form of the paper's Tables 1, 2 and 5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import read_json
from proxykd_jax.reporting.blocks import Block, Fold, Section, Table, Text, Value
from proxykd_jax.reporting.curves import is_number
from proxykd_jax.reporting.paper import (
    BENCHMARKS,
    TABLE_1,
    TABLE_2,
    TABLE_5,
    PaperRow,
    average,
)
from proxykd_jax.reporting.run_folder import RunFolder
from proxykd_jax.reporting.teacher import teacher_names

_NAMES = {name.lower(): name for name in BENCHMARKS} | {"commonsenseqa": "CSQA", "bbeh": "BBH"}
_HEADER = ("method", "student", "teacher", *BENCHMARKS, "average")
MISPRINT = "†"


@dataclass(frozen=True)
class Score:
    """A benchmark's accuracy in percent, with standard error and number of questions if known."""

    accuracy: float
    error: float | None = None
    questions: int | None = None


def read_benchmarks(run: RunFolder) -> dict[str, dict[str, Score]]:
    """Scores by model and benchmark; empty if there are none.

    ``eval/benchmarks/summary.json`` holds them under ``models``, by name. Instead, a model may have
    a ``summary.json`` in a folder of its name. Generated answers take precedence over compared
    log-likelihoods. A benchmark's entry is its accuracy (a share of 1), or a section with
    ``accuracy`` and perhaps ``se`` and ``n``.
    """
    folder = run.folder / "eval" / "benchmarks"
    models = dict(_read_summary(folder).get("models", {}))
    for path in sorted(folder.glob("*/summary.json")):
        models[path.parent.name] = read_json(path)
    found: dict[str, dict[str, Score]] = {}
    for model, data in models.items():
        for key in ("generate", "loglikelihood", "raw"):
            data = data.get(key, data)
        for key in ("benchmarks", "tasks", "results"):
            data = data.get(key, data)
        scores = {_NAMES.get(name.lower(), name): _score(entry) for name, entry in data.items()}
        known = {name: score for name, score in scores.items() if score is not None}
        order = [n for n in BENCHMARKS if n in known] + sorted(set(known) - set(BENCHMARKS))
        if order:
            found[model] = {name: known[name] for name in order}
    return found


def _read_summary(folder: Path) -> dict[str, Any]:
    path = folder / "summary.json"
    return dict(read_json(path)) if path.is_file() else {}


def _score(entry: Any) -> Score | None:
    if is_number(entry):
        return Score(100 * float(entry)) if 0 <= entry <= 1 else None
    if not isinstance(entry, dict) or not is_number(entry.get("accuracy")):
        return None
    error = entry.get("se")
    return Score(
        100 * float(entry["accuracy"]),
        100 * float(error) if error is not None and is_number(error) else None,
        entry.get("n"),
    )


def benchmarks(runs: Sequence[RunFolder]) -> Section:
    """The runs' scores above the paper's."""
    own = {run.label: read_benchmarks(run) for run in runs}
    title = "Benchmarks"
    paper = [
        Fold("The paper's Table 1, all methods", [_paper_table("Table 1 of the paper", TABLE_1)]),
        Fold("The paper's Table 2, ablations", [_paper_table("Table 2 of the paper", TABLE_2)]),
        Fold("The paper's Table 5, Qwen", [_paper_table("Table 5 of the paper", TABLE_5)]),
    ]
    if not any(own.values()):
        missing = Text(
            "No benchmarks were measured: eval/benchmarks/summary.json does not exist.",
            missing=True,
        )
        return Section(title, [missing, *paper])
    rows: list[tuple[Value, ...]] = []
    for run in runs:
        for model, scores in own[run.label].items():
            six = tuple(scores[n].accuracy if n in scores else None for n in BENCHMARKS)
            name = model if len(runs) == 1 else f"{run.label}: {model}"
            rows.append((name, *_models(run, model), *six, average(six)))
    groups = {0: "measured here", len(rows): "paper, Proxy-KD and its baselines"}
    compared = [row for row in TABLE_1 if row.method in ("GPT-4", "Black-Box KD", "Proxy-KD")]
    table = Table(
        "Accuracy, %",
        _HEADER,
        [*rows, *(_cells(row) for row in compared)],
        misprints(compared),
        digits=2,
        groups=groups,
    )
    blocks: list[Block] = [table]
    further = _further(own, len(runs) > 1)
    if further is not None:
        blocks.append(further)
    differences = (_differences(run, len(runs) > 1) for run in runs)
    blocks += [found for found in differences if found is not None]
    return Section(title, [*blocks, *paper])


def _models(run: RunFolder, model: str) -> tuple[str | None, str | None]:
    """The initial checkpoint of the measured model, and its teacher; None if unknown."""
    role = model.partition("_")[0]
    if role not in ("student", "proxy"):
        return None, None
    origin = run.setting(f"{role}.path") or run.setting(f"{role}.init.path")
    teachers = ", ".join(teacher_names(run)) or "the teacher"
    return (Path(origin).name if origin else None), teachers


def _further(own: dict[str, dict[str, dict[str, Score]]], several: bool) -> Table | None:
    """Standard errors and numbers of questions, and other benchmarks than the six."""
    rows: list[tuple[Value, ...]] = [
        (f"{label}: {model}" if several else model, task, s.accuracy, s.error, s.questions)
        for label, models in own.items()
        for model, scores in models.items()
        for task, s in scores.items()
    ]
    if not any(row[3] is not None or row[4] is not None for row in rows):
        return None
    header = ("model", "benchmark", "accuracy, %", "±", "questions")
    return Table("Each benchmark", header, rows, digits=2)


def _differences(run: RunFolder, several: bool) -> Table | None:
    """Differences between the models of a run, on the questions that both answered."""
    rows: list[tuple[Value, ...]] = []
    found = _read_summary(run.folder / "eval" / "benchmarks").get("differences", {})
    for pair, entry in found.items():
        tasks = {_NAMES.get(n.lower(), n): d for n, d in entry.get("tasks", {}).items()}
        if "macro_average" in entry:
            tasks["mean"] = entry["macro_average"]
        for name, gap in tasks.items():
            error = gap.get("se")
            points, spread = 100 * gap["difference"], None if error is None else 100 * error
            rows.append((pair.replace(" - ", " minus "), name, points, spread, gap.get("n")))
    if not rows:
        return None
    title = "Differences on the same questions" + (f", {run.label}" if several else "")
    header = ("models", "benchmark", "points", "±", "questions")
    return Table(title, header, rows, "Paired by question.", digits=2)


def _paper_table(title: str, rows: Sequence[PaperRow]) -> Table:
    groups = {i: row.group for i, row in enumerate(rows) if not i or rows[i - 1].group != row.group}
    header: tuple[str, ...] = _HEADER
    cells = [_cells(row) for row in rows]
    if any(row.proxy for row in rows):
        header = (*_HEADER[:2], "proxy", *_HEADER[2:])
        cells = [(*c[:2], row.proxy, *c[2:]) for c, row in zip(cells, rows, strict=True)]
    return Table(title, header, cells, misprints(rows), digits=2, groups=groups)


def _cells(row: PaperRow) -> tuple[Value, ...]:
    mark = f" {MISPRINT}" if row.misprinted else ""
    return (f"{row.method}{mark}", row.student, row.teacher, *row.scores,
            row.average if row.printed is None else row.printed)  # fmt: skip


def misprints(rows: Sequence[PaperRow]) -> str:
    """A sentence on printed averages that do not match their rows; empty if all match."""
    wrong = [
        f"{row.method}, {row.student}: printed {row.printed:.2f}, the six scores give "
        f"{row.average:.2f}"
        for row in rows
        if row.misprinted
    ]
    if not wrong:
        return ""
    return f"{MISPRINT} The average printed in the paper does not follow: {'; '.join(wrong)}."
