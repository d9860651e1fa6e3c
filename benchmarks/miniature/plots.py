"""Draws the demo's plots, as SVG and PNG, from its figures and its metrics.jsonl."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.training.metrics import read_metrics

if TYPE_CHECKING:
    from benchmarks.miniature.report import Measured

# Colour-blind readers can tell apart the colours of this palette (Okabe and Ito).
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
    "proxy_unaligned": "#dddddd",
    "proxy_aligned": "#bbbbbb",
    "student_pretrained": GREY,
    "black_box_ds": SKY,
    "black_box_all": BLUE,
    "takd": ORANGE,
    "without_alignment": RED,
    "proxy_kd": GREEN,
    "proxy_kd_fresh": PURPLE,
}


@contextlib.contextmanager
def plotting() -> Iterator[Any]:
    """Gives matplotlib's pyplot without a display, in the style of all plots."""
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
    with plt.rc_context(style):
        yield plt


def draw_all(out: Path, measured: Mapping[str, Measured], logs: Mapping[str, Path]) -> list[Path]:
    """Draws ``alignment``, ``students`` and ``losses`` into ``out``; returns the files."""
    lines = {name: read_metrics(path)[0] for name, path in logs.items()}
    with plotting() as plt:
        figures = {
            "alignment": _alignment(plt, measured, lines["proxy_kd"]),
            "students": _students(plt, measured),
            "losses": _losses(plt, measured, lines),
        }
        return [path for name, figure in figures.items() for path in save(plt, figure, out / name)]


def save(plt: Any, figure: Any, path: Path) -> list[Path]:
    """Writes a figure as SVG and as PNG, and closes it; returns the files."""
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("svg", "png")]
    for file in files:
        figure.savefig(file, dpi=160)
    plt.close(figure)
    return files


def series(
    lines: list[dict[str, Any]], stage: str, name: str
) -> tuple[list[int], list[float], list[str]]:
    """The steps, values and phases of one figure in a stage."""
    found = [line for line in lines if line["stage"] == stage and line.get(name) is not None]
    steps, values = ([line[key] for line in found] for key in ("step", name))
    return steps, values, [line.get("phase", "") for line in found]


def _alignment(plt: Any, measured: Mapping[str, Measured], lines: list[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6))
    titles = {
        "agreement": "Share of the teacher's tokens chosen first",
        "nll": "NLL of the teacher's tokens (nats)",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        steps, values, phases = series(lines, "align", f"validation/{name}")
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
    """Draws a line where a phase ends, and writes its name under the middle of it."""
    ends = {phase: step for step, phase in zip(steps, phases, strict=True)}
    begin = 0
    for phase, end in ends.items():
        if end == begin:
            continue  # This is the look at the raw proxy, which has no steps.
        axis.axvline(end, color="#cccccc", linewidth=0.8, zorder=0)
        axis.annotate(
            phase.replace("_0", " ").replace("_", " "),
            ((begin + end) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color="#777777",
        )
        begin = end


def _students(plt: Any, measured: Mapping[str, Measured]) -> Any:
    names = [name for name in COLOURS if name in measured][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    titles = {
        "accuracy": "Greedy accuracy (more is better)",
        "kl": "KL(teacher || model), nats a token (less is better)",
    }
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        figures = [getattr(measured[model], name) for model in names]
        bars = axis.barh(
            [measured[model].label for model in names],
            [figure.value for figure in figures],
            xerr=[figure.error or 0 for figure in figures],
            color=[COLOURS[model] for model in names],
            error_kw={"elinewidth": 1, "ecolor": BLACK},
            height=0.7,
        )
        labels = [f"{figure.value:.3f}" for figure in figures]
        axis.bar_label(bars, labels=labels, padding=4, fontsize=8.5)
        axis.set_title(title)
        axis.grid(axis="y", visible=False)
        axis.grid(axis="x", visible=True)
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
    ceiling = measured["teacher"].accuracy.value
    axes[0].axvline(ceiling, color=BLACK, linestyle=":", linewidth=1)
    axes[0].annotate(
        f"the teacher: {ceiling:.3f}",
        (ceiling, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-3, 0),
        textcoords="offset points",
        rotation=90,
        ha="right",
        va="bottom",
        fontsize=8.5,
    )
    axes[0].set_xlim(right=1)
    return figure


def _losses(
    plt: Any, measured: Mapping[str, Measured], lines: Mapping[str, list[dict[str, Any]]]
) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 3.8), sharey=True)
    for name, of_one in lines.items():
        label, colour = measured[name].label, COLOURS[name]
        steps, values, _ = series(of_one, "distill", "nll")
        axes[0].plot(steps, _smooth(values), color=colour, linewidth=1.2)
        steps, values, _ = series(of_one, "distill", "validation/nll")
        axes[1].plot(steps, values, color=colour, marker="o", markersize=2.5, label=label)
    axes[0].set_title("Training: NLL of the teacher's tokens (nats)")
    axes[1].set_title("Validation: NLL of the teacher's tokens (nats)")
    for axis in axes:
        line = axis.axhline(measured["teacher"].nll.value, color=BLACK, linestyle=":", linewidth=1)
        axis.set_xlabel("student step")
    line.set_label("the teacher itself, on test rows")
    figure.legend(loc="outside right center", frameon=False, fontsize=8.5)
    return figure


def _smooth(values: list[float], width: int = 9) -> list[float]:
    """The running mean over the last ``width`` steps."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1))
        for i in range(len(values))
    ]
