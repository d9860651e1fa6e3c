"""Figures 3, 6 and 7 of the paper, from their rows' runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxykd_jax.config.table_file import TableFile, TableRow
from proxykd_jax.reporting.blocks import BarPlot, LinePlot, Plot, Series, Table, Value
from proxykd_jax.reporting.curves import points
from proxykd_jax.reporting.paper import BENCHMARKS
from proxykd_jax.reporting.run_folder import RunFolder

if TYPE_CHECKING:
    from proxykd_jax.reporting.paper_table import Measured

_PREFIX = "benchmark/"
_MEAN = "mean"


def curve(run: RunFolder) -> dict[str, tuple[list[int], list[float]]]:
    """Samples seen and accuracies in percent, by benchmark, as logged during training.

    The samples are steps times the batch; for packed rows, whose number is not fixed, they are at
    least so many.
    """
    lines = run.of_stage("distill")
    names = sorted({name for line in lines for name in line if name.startswith(_PREFIX)})
    rows = run.setting("distill.batch_size") or 1
    found = {}
    for name in names:
        steps, shares = points(lines, name)
        if steps:
            found[name.removeprefix(_PREFIX)] = (
                [int(step) * rows for step in steps],
                [100 * share for share in shares],
            )
    return found


def curves(table: TableFile, rows: Sequence[Measured]) -> tuple[list[Plot], Table]:
    """Figures 6 and 7: a plot per benchmark with one curve per row, and the numbers."""
    found = {
        row.row.name: curve(row.run) for row in rows if row.run is not None and not row.problem
    }
    logged = {task for tasks in found.values() for task in tasks}
    shown = [name for name in (*BENCHMARKS, _MEAN) if name.lower() in logged]
    plots: list[Plot] = []
    for name in shown:
        series = [
            Series(_legend(row.row), *found[row.row.name][name.lower()], points=True)
            for row in rows
            if name.lower() in found.get(row.row.name, {})
        ]
        plots.append(LinePlot(f"{name}, accuracy in %", "training samples", series))
    lines: list[tuple[Value, ...]] = []
    for row in rows:
        tasks = found.get(row.row.name)
        columns = (row.row.name, row.row.method, row.row.student)
        if tasks is None:
            lines.append((*columns, row.problem, *[None] * len(shown)))
            continue
        by_task = [dict(zip(*tasks.get(name.lower(), ((), ())), strict=True)) for name in shown]
        for samples in sorted({x for values in by_task for x in values}):
            lines.append((*columns, samples, *(values.get(samples) for values in by_task)))
    note = (
        "Accuracy in percent while the student trains. The paper draws these curves and prints no "
        "number; their ends are rows of Table 1."
    )
    return plots, Table(
        table.title, ("row", "method", "student", "samples", *shown), lines, note, digits=2
    )


def _legend(row: TableRow) -> str:
    return f"{row.method} ({row.student})"


def proxy_gaps(rows: Sequence[Measured]) -> tuple[list[Plot], Table]:
    """Figure 3: accuracies of each proxy and its student, and the gap between the two."""
    bars = [
        (
            f"{row.row.proxy}: {'proxy' if row.row.model.startswith('proxy') else 'student'}",
            [
                None if score is None else (score.accuracy, score.error)
                for score in map(row.scores.get, BENCHMARKS)
            ],
        )
        for row in rows
        if row.scores
    ]
    lines: list[tuple[Value, ...]] = []
    for name in dict.fromkeys(row.row.proxy for row in rows):
        both = [row for row in rows if row.row.proxy == name]
        proxy, student = (
            next((r.scores for r in both if r.row.model.startswith(role)), {})
            for role in ("proxy", "student")
        )
        for task in (*BENCHMARKS, "average"):
            if task in proxy and task in student:
                one, other = proxy[task].accuracy, student[task].accuracy
                gap = one - other
                lines.append((name, task, one, other, gap, gap / one if one else None))
    header = ("proxy", "benchmark", "proxy, %", "student, %", "gap", "gap / proxy")
    note = "The paper shows the gap between a proxy and its student as a ratio."
    plots: list[Plot] = [BarPlot("Accuracy, %", BENCHMARKS, bars)] if bars else []
    return plots, Table("Gap between proxy and student", header, lines, note, digits=2)
