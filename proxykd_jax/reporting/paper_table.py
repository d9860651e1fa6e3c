"""Tables 1, 2, 3 and 5 and Figures 3, 6 and 7 of the paper, from their rows' runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import read_json, write_bytes
from proxykd_jax.config.table_file import NONE, TableFile, TableRow
from proxykd_jax.reporting.benchmark_tables import MISPRINT, Score, misprints, read_benchmarks
from proxykd_jax.reporting.blocks import (
    Block,
    Fold,
    Plot,
    Plots,
    Section,
    Table,
    Text,
    Value,
    shown,
)
from proxykd_jax.reporting.cost import PhaseTime, phase_times
from proxykd_jax.reporting.markdown import markdown
from proxykd_jax.reporting.page import Chapter, page
from proxykd_jax.reporting.paper import (
    BENCHMARKS,
    FIGURE_3,
    SAMPLES_A_ROUND,
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_5,
    PaperRow,
    average,
)
from proxykd_jax.reporting.paper_figure import curve, curves, proxy_gaps
from proxykd_jax.reporting.run_folder import UNREADABLE, RunFolder, read_run, told

# The file that a finished row leaves in its run's folder.
ROW = "row.json"
_ACCURACIES = {"Table 1": TABLE_1, "Table 2": TABLE_2, "Table 5": TABLE_5, "Figure 3": FIGURE_3}
_AVERAGE = "average"


@dataclass(frozen=True)
class Measured:
    """The results of a row's run.

    Attributes:
      row: the row in the table's file.
      run: the run's folder; None if the row is not finished.
      record: ``row.json``: the model that answered (``model``), and the devices.
      scores: by benchmark, and their average if all six exist.
      times: times of the steps that Table 3 asks for.
      problem: why there is nothing to show; empty if there is something.
    """

    row: TableRow
    run: RunFolder | None
    record: Mapping[str, Any]
    scores: Mapping[str, Score]
    times: Sequence[PhaseTime]
    problem: str = ""


def write_table(table: TableFile) -> Path:
    """Writes the table as ``<name>.md``, ``.html`` and ``.csv`` (unrounded) into its folder.

    The plots of a figure are in the page; the other two files hold their numbers.

    Returns:
      The Markdown file.
    """
    rows = [read_row(table, row) for row in table.rows]
    plots: list[Plot] = []
    more: list[Table] = []
    if table.has_curves:
        plots, shown_table = curves(table, rows)
        whole = shown_table
    else:
        shown_table, whole = (_hours if table.table == 3 else _accuracies)(table, rows)
    if table.figure == 3:
        plots, gap = proxy_gaps(rows)
        more.append(gap)
    done = sum(not found.problem for found in rows)
    title = f"{table.title} of the paper, and here"
    about = f"{table.name}: {done} of {len(rows)} rows are measured."
    texts = [Text(text) for text in (about, table.note) if text]
    text = markdown(Section(title, [*texts, shown_table, *more]))
    drawn: list[Block] = [Plots(plots)] if plots else []
    blocks: list[Block] = [*texts, *drawn, shown_table, *more]
    if whole is not shown_table:
        blocks.append(Fold("Each benchmark, unrounded", [whole]))
    section = Section(title, blocks)
    html = page(
        table.name, f"a {table.title.split()[0].lower()} of the paper", [Chapter("", [section])]
    )
    for ending, content in (("html", html), ("csv", whole.csv()), ("md", text)):
        path = table.folder / f"{table.name}.{ending}"
        # Rows may run as separate jobs, each of which writes the table.
        write_bytes(path, content.encode(), one_of_several=True)
    return path


def read_row(table: TableFile, row: TableRow) -> Measured:
    """The results of a row. An error in one row does not affect the others."""
    folder = table.folder / row.name
    if not (folder / ROW).is_file():
        outputs = row.model.endswith(".jsonl") and not Path(row.model).is_file()
        problem = f"there is no {row.model}" if outputs else "not run yet"
        return Measured(row, None, {}, {}, (), problem)
    try:
        record, run = dict(read_json(folder / ROW)), read_run(folder)
        if row.phase is not None:
            times = _timed(run, row.phase)
            problem = "" if times else "no step of it was timed"
            return Measured(row, run, record, {}, times, problem)
        if table.has_curves:
            problem = "" if curve(run) else "no benchmark was logged"
            return Measured(row, run, record, {}, (), problem)
        scores = read_benchmarks(run).get(record["model"], {})
        problem = "" if scores else "its answers are missing: run the row again"
        return Measured(row, run, record, _with_average(scores), (), problem)
    except UNREADABLE as error:
        return Measured(row, None, {}, {}, (), told(error))


# --- accuracies -----------------------------------------------------------------------------------


def _with_average(scores: Mapping[str, Score]) -> dict[str, Score]:
    six = [scores.get(name) for name in BENCHMARKS]
    mean = average(tuple(None if score is None else score.accuracy for score in six))
    if mean is None:
        return dict(scores)
    errors = [score.error for score in six if score is not None and score.error is not None]
    spread = math.hypot(*errors) / len(six) if len(errors) == len(six) else None
    return {**scores, _AVERAGE: Score(mean, spread)}


def paper_row(table: TableFile, row: TableRow) -> PaperRow | None:
    """The paper's row that corresponds to a row; None if there is none."""
    for found in _ACCURACIES[table.title]:
        columns = (found.group, found.method, found.student, found.proxy or NONE, found.teacher)
        if columns == (row.group, row.method, row.student, row.proxy, row.teacher):
            return found
    return None


def _of_paper(found: PaperRow | None) -> dict[str, float | None]:
    """Its scores; the average is computed from the six, whatever the paper prints."""
    if found is None:
        return {}
    return {**dict(zip(BENCHMARKS, found.scores, strict=True)), _AVERAGE: found.average}


def _accuracies(table: TableFile, rows: Sequence[Measured]) -> tuple[Table, Table]:
    """The table for readers, and as data."""
    columns = (*BENCHMARKS, _AVERAGE)
    proxies = any(found.row.proxy != NONE for found in rows)
    lines: list[tuple[Value, ...]] = []
    data: list[tuple[Value, ...]] = []
    groups: dict[int, str] = {}
    papers: list[PaperRow] = []
    for place, found in enumerate(rows):
        row, paper = found.row, paper_row(table, found.row)
        theirs = _of_paper(paper)
        if not place or rows[place - 1].row.group != row.group:
            groups[len(lines)] = row.group
        if paper is not None and not row.reading:
            papers.append(paper)
            printed = paper.average if paper.printed is None else paper.printed
            mark = f" {MISPRINT}" if paper.misprinted else ""
            cells = [shown(score, 2) for score in (*paper.scores, printed)]
            cells[-1] += mark
            lines.append(("paper", *_columns(row, proxies), *cells))
        lines.append(_here(found, proxies, columns))
        gaps = {
            name: found.scores[name].accuracy - value
            for name, value in theirs.items()
            if value is not None and name in found.scores
        }
        if gaps:
            blank = [""] * len(_columns(row, proxies))
            signed = [_signed(gaps[name]) if name in gaps else "" for name in columns]
            lines.append(("difference", *blank, *signed))
        for name in dict.fromkeys((*columns, *found.scores)):
            score = found.scores.get(name)
            figures = (score.accuracy, score.error, score.questions) if score else (None,) * 3
            texts = (row.name, row.group, row.method, row.student, row.proxy, row.teacher)
            data.append((*texts, name, *figures, theirs.get(name), gaps.get(name)))
    heads = ("method", "student", *(("proxy",) if proxies else ()), "teacher")
    note = (
        "Accuracy, percent, ± standard error of the measured ones. Differences are in points, here "
        "minus paper; the averages' are to what the paper's six scores give. "
        + misprints(list(dict.fromkeys(papers)))
    )
    if any(paper.printed is None and paper.average is not None for paper in papers):
        note += "The paper prints no averages here: these are of its six scores."
    title = table.title
    names = (
        *("row", "group", "method", "student", "proxy", "teacher", "benchmark"),
        *("accuracy, %", "standard error", "questions", "paper", "difference"),
    )
    return (
        Table(title, ("", *heads, *columns), lines, note.strip(), groups=groups),
        Table(f"{table.name}, unrounded", names, data),
    )


def _columns(row: TableRow, proxies: bool) -> tuple[str, ...]:
    return (row.method, row.student, *((row.proxy,) if proxies else ()), row.teacher)


def _here(found: Measured, proxies: bool, columns: Sequence[str]) -> tuple[Value, ...]:
    """The measured row: its name, the model that answered, and the proxy behind it."""
    if found.problem or found.run is None:
        blank = [""] * (len(columns) + len(_columns(found.row, proxies)) - 2)
        return ("here", _named(found.row), found.problem, *blank)
    student, proxy, run = found.row.model, "", found.run
    role = found.row.model.partition(":")[0]
    if role in ("student", "proxy"):
        student = _origin(run, role)
        if role == "student" and run.config is not None and run.config.needs != "nothing":
            proxy = _origin(run, "proxy")
    scores = [found.scores.get(name) for name in columns]
    cells = ["–" if score is None else _with_error(score) for score in scores]
    behind = (proxy, "") if proxies else (f"by way of {proxy}" if proxy else "",)
    return ("here", _named(found.row), student, *behind, *cells)


def _named(row: TableRow) -> str:
    return f"{row.name} ({row.reading})" if row.reading else row.name


def _origin(run: RunFolder, role: str) -> str:
    """The initial checkpoint of a role: its folder's name, and its number of layers if cut."""
    path = run.setting(f"{role}.path") or run.setting(f"{role}.init.path") or "?"
    layers = run.setting(f"{role}.init.first_layers")
    return Path(path).name + (f", {layers} layers" if layers else "")


def _with_error(score: Score) -> str:
    error = "" if score.error is None else f" ± {shown(score.error, 2)}"
    return shown(score.accuracy, 2) + error


def _signed(value: float) -> str:
    return ("+" if value >= 0 else "") + shown(value, 2)


# --- hours ----------------------------------------------------------------------------------------


def _timed(run: RunFolder, phase: str) -> list[PhaseTime]:
    """The phases that a row of Table 3 asks for and whose hours are known."""
    wanted = {
        "warmup": lambda time: time.phase == "warmup",
        "rounds": lambda time: time.phase.startswith("round_"),
        "student": lambda time: time.phase == "train",
    }[phase]
    stage = "distill" if phase == "student" else "align"
    found = [time for time in phase_times(run) if time.stage == stage and wanted(time)]
    return [time for time in found if time.hours_for_a_round is not None]


def _hours(table: TableFile, rows: Sequence[Measured]) -> tuple[Table, Table]:
    """One table, which is also its own data."""
    theirs = {name: (gpus, hours) for name, gpus, hours in TABLE_3}
    ours: dict[str, tuple[int, float]] = {}
    for found in rows:
        hours = [h for h in (time.hours_for_a_round for time in found.times) if h is not None]
        if hours:
            ours[found.row.method] = (found.record["devices"], statistics.median(hours))
    lines: list[tuple[Value, ...]] = []
    for found in rows:
        name = found.row.method
        lines.append(
            (
                name,
                *theirs.get(name, (None, None)),
                _to_sft(name, theirs),
                found.problem or str(found.record["device"]),
                *ours.get(name, (None, None)),
                _to_sft(name, ours),
                sum(time.steps for time in found.times) or None,
            )
        )
    note = (
        "Hours from the median step of a phase without its first, which compiles; of rounds with "
        "the drawing of the proxy's answers, and their median. Times SFT: device-hours over those "
        "of the SFT of the same size, so that rows on more devices can be compared."
    )
    if any(time.drawing is None for found in rows if found.row.phase == "rounds"
           for time in found.times):  # fmt: skip
        note += " In some rounds the drawing was not timed, and is not in the hours."
    header = (
        *("model and method", "paper: GPUs", "paper: hours", "paper: times SFT"),
        *("here: device", "here: devices", "here: hours", "here: times SFT", "steps timed"),
    )
    title = f"{table.title}: hours for {SAMPLES_A_ROUND:,} samples"
    made = Table(title, header, lines, note)
    return made, made


def _to_sft(name: str, hours: Mapping[str, tuple[int, float]]) -> float | None:
    """Device-hours of a row divided by those of the SFT of its size; None if one is unknown."""
    base = f"{name.rpartition('-')[0]}-SFT"
    if name not in hours or base not in hours:
        return None
    return math.prod(hours[name]) / math.prod(hours[base])
