"""The demo's plots: vector (SVG) and PNG, from its figures and its metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.miniature.report import Measured

# Okabe and Ito's palette, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#999999",
    "#222222",
)
COLOURS = {
    "student_pretrained": GREY,
    "black_box_ds": SKY,
    "black_box_all": BLUE,
    "takd": ORANGE,
    "without_alignment": RED,
    "proxy_kd": GREEN,
    "proxy_kd_fresh": PURPLE,
}


def draw_all(out: Path, measured: Mapping[str, Measured], logs: Mapping[str, Path]) -> list[Path]:
    """Draws ``alignment``, ``students`` and ``losses`` into ``out``; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "grid.color": "#e6e6e6",
        "font.size": 9.5,
        "svg.fonttype": "none",
        "figure.constrained_layout.use": True,
    }
    lines = {name: read_metrics(path) for name, path in logs.items()}
    written = []
    with plt.rc_context(style):
        for name, figure in (
            ("alignment", _alignment(plt, measured, lines["proxy_kd"])),
            ("students", _students(plt, measured)),
            ("losses", _losses(plt, measured, lines)),
        ):
            for suffix in ("svg", "png"):
                path = out / f"{name}.{suffix}"
                figure.savefig(path, dpi=160)
                written.append(path)
            plt.close(figure)
    return written


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def series(
    lines: list[dict[str, Any]], stage: str, name: str
) -> tuple[list[int], list[float], list[str]]:
    """Steps, values and phases of one figure in a stage."""
    found = [
        (line["step"], line[name], line.get("phase", ""))
        for line in lines
        if line["stage"] == stage and line.get(name) is not None
    ]
    steps, values, phases = (
        (list(column) for column in zip(*found, strict=True))
        if found
        else (
            [],
            [],
            [],
        )
    )
    return steps, values, phases


def _alignment(plt: Any, measured: Mapping[str, Measured], lines: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    plans = (
        (
            axes[0],
            "validation/agreement",
            "agreement",
            "Share of the teacher's tokens chosen first",
        ),
        (axes[1], "validation/nll", "nll", "NLL of the teacher's tokens (nats)"),
    )
    for axis, metric, name, title in plans:
        steps, values, phases = series(lines, "align", metric)
        axis.plot(steps, values, color=GREEN, marker="o", markersize=3.5)
        ceiling = getattr(measured["teacher"], name).value
        axis.axhline(ceiling, color=BLACK, linestyle=":", linewidth=1)
        axis.annotate(
            "the teacher itself, on test rows",
            (1, ceiling),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
        )
        _mark_phases(axis, steps, phases)
        axis.set_title(title)
        axis.set_xlabel("alignment step (validation rows)")
        axis.margins(y=0.18)
    return figure


def _mark_phases(axis: Any, steps: list[int], phases: list[str]) -> None:
    """A line where a phase begins, with its name above."""
    previous = 0
    for index, (step, phase) in enumerate(zip(steps, phases, strict=True)):
        if index == 0 or phase != phases[index - 1]:
            if index:
                previous = steps[index - 1]
                axis.axvline(previous, color="#cccccc", linewidth=0.8)
            axis.annotate(
                phase.replace("_", " "),
                (previous if index else min(step, 0), 0),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=7.5,
                color="#777777",
            )


def _students(plt: Any, measured: Mapping[str, Measured]) -> Any:
    names = [name for name in COLOURS if name in measured][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), sharey=True)
    plans = (
        (axes[0], "accuracy", "Greedy accuracy on unseen prompts (more is better)"),
        (axes[1], "kl", "Exact KL(teacher || student), nats a token (less is better)"),
    )
    for axis, name, title in plans:
        figures = [getattr(measured[student], name) for student in names]
        values = [figure.value for figure in figures]
        bars = axis.barh(
            [measured[student].label for student in names],
            values,
            xerr=[figure.error or 0 for figure in figures],
            color=[COLOURS[student] for student in names],
            error_kw={"elinewidth": 1, "ecolor": BLACK},
            height=0.68,
        )
        axis.bar_label(bars, labels=[f"{value:.3f}" for value in values], padding=4, fontsize=8.5)
        marks = [
            ("proxy_unaligned", "unaligned proxy", GREY),
            ("proxy_aligned", "aligned proxy", GREEN),
        ]
        if name == "accuracy":
            marks.append(("teacher", "teacher", BLACK))
        for model, text, colour in marks:
            value = getattr(measured[model], name).value
            axis.axvline(value, color=colour, linestyle="--", linewidth=1)
            axis.annotate(
                text,
                (value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-3, -2),
                textcoords="offset points",
                rotation=90,
                va="top",
                ha="right",
                fontsize=7.5,
                color=colour,
            )
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.set_xlim(left=0)
        axis.margins(x=0.1)
    return figure


def _losses(
    plt: Any, measured: Mapping[str, Measured], lines: Mapping[str, list[dict[str, Any]]]
) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
    for name, of_one in lines.items():
        label, colour = measured[name].label, COLOURS[name]
        steps, values, _ = series(of_one, "distill", "nll")
        axes[0].plot(steps, _smooth(values), color=colour, linewidth=1.2)
        steps, values, _ = series(of_one, "distill", "validation/nll")
        axes[1].plot(steps, values, color=colour, marker="o", markersize=2.5, label=label)
    axes[0].set_title("Training: NLL of the teacher's tokens (nats)")
    axes[1].set_title("Validation: NLL of the teacher's tokens (nats)")
    for axis in axes:
        axis.axhline(measured["teacher"].nll.value, color=BLACK, linestyle=":", linewidth=1)
        axis.set_xlabel("student step")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """Running mean over the last ``width`` steps."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1))
        for i in range(len(values))
    ]
