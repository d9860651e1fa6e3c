"""Series from the lines of metrics.jsonl, and plots of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from proxykd_jax.reporting.blocks import LinePlot, Series
from proxykd_jax.reporting.run_folder import Line, RunFolder

# Longer curves are drawn as means over neighbouring points.
MOST_POINTS = 360


def points(lines: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of a figure at the steps where a finite number was logged."""
    found = [
        (line["step"], line[name])
        for line in lines
        if isinstance(line.get("step"), int) and is_number(line.get(name))
    ]
    return [float(step) for step, _ in found], [float(value) for _, value in found]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number; booleans are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def thinned(xs: list[float], ys: list[float]) -> tuple[list[float], list[float], int]:
    """Means over each ``n`` neighbours, so that at most ``MOST_POINTS`` remain; and ``n``."""
    width = -(-len(xs) // MOST_POINTS) if xs else 1
    if width == 1:
        return xs, ys, 1
    groups = range(0, len(xs), width)
    return (
        [_mean(xs[i : i + width]) for i in groups],
        [_mean(ys[i : i + width]) for i in groups],
        width,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def plot(
    lines: Sequence[Line],
    title: str,
    curves: Sequence[tuple[str, str, bool]],
    *,
    best: tuple[str, float | None, str] | None = None,
    ends: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> LinePlot | None:
    """A plot of the figures that exist; None if none does.

    Args:
      lines: lines of one stage.
      title: title of the plot.
      curves: (name in the legend, name in the log, whether to mark its points).
      best: (name in the log, step, text) of a point to ring.
      ends: ends of phases.
      note: sentence below the plot.
    """
    series, widest = [], 1
    for legend, name, marked in curves:
        xs, ys, width = thinned(*points(lines, name))
        widest = max(widest, width)
        if xs:
            series.append(Series(legend, xs, ys, points=marked and width == 1))
    if not series:
        return None
    rings = []
    if best is not None and best[1] is not None:
        name, step, text = best
        rings = [(x, y, text) for x, y in zip(*points(lines, name), strict=True) if x == step][-1:]
    if widest > 1:
        note = f"{note} Points are means over {widest} neighbouring steps.".strip()
    return LinePlot(title, "step", series, ends, rings, note)


def phase_ends(lines: Sequence[Line]) -> list[tuple[float, str]]:
    """(last step, name) of each phase, in order."""
    ends: dict[str, float] = {}
    for line in lines:
        if line.get("phase") and isinstance(line.get("step"), int):
            ends[line["phase"]] = float(line["step"])
    return [(step, phase_name(phase)) for phase, step in ends.items() if step > 0]


def phase_name(phase: str) -> str:
    """``round_03`` as ``r3``; other names unchanged."""
    head, _, number = phase.partition("_")
    return f"r{int(number)}" if head == "round" and number.isdigit() else phase.replace("_", " ")


def phases(lines: Sequence[Line]) -> list[str]:
    """Names of the phases, in order."""
    return list(dict.fromkeys(line["phase"] for line in lines if line.get("phase")))


def last_of_phase(lines: Sequence[Line], phase: str, name: str) -> float | None:
    """The last value of a figure in a phase."""
    found = [line[name] for line in lines if line.get("phase") == phase and name in line]
    return float(found[-1]) if found and is_number(found[-1]) else None


def held_out_kind(lines: Sequence[Line]) -> str:
    """The log's name of validation: separate rows, or D_s if there are none."""
    with_rows = any("validation/nll" in line for line in lines)
    return "validation" if with_rows or not _any(lines, "held_out/nll") else "held_out"


def _any(lines: Sequence[Line], name: str) -> bool:
    return any(name in line for line in lines)


def other_figures(run: RunFolder, stage: str, shown: set[str]) -> Iterator[tuple[str, LinePlot]]:
    """Plots of all figures of a stage that are not in ``shown``, by name."""
    lines = run.of_stage(stage)
    names = dict.fromkeys(
        name
        for line in lines
        for name, value in line.items()
        if is_number(value) and name != "step" and not name.startswith("time/")
    )
    for name in sorted(set(names) - shown):
        found = plot(lines, name, [(name, name, False)], ends=phase_ends(lines))
        if found is not None and len(found.series[0].xs) > 1:
            yield name, found
