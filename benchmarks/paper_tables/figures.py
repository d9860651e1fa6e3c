"""Draws the figures of one regime and preset, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.miniature.plots import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, plotting, save
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.labels import STATE_LABELS, label_of
from benchmarks.paper_tables.methods import BLACK_BOX, METHODS, PROXY_KD
from benchmarks.paper_tables.metrics import ACCURACY, AGREEMENT, BEST, KL, LAST, TOP_KS
from benchmarks.paper_tables.statistics import MANY_ERRORS, Results

CURVES = {BLACK_BOX: SKY, "fkl_unaligned": ORANGE, PROXY_KD: GREEN}
STATES = {px.RAW: GREY, px.WARMUP: SKY, px.NLL: BLUE, px.PREFERENCE: GREEN}


def draw(out: Path, results: Results) -> list[Path]:
    """Draws what the records allow; returns the files."""
    plans: dict[str, tuple[bool, Callable[[Any, Results], Any]]] = {
        "students": (results.has(BLACK_BOX), _students),
        "fig_3_proxy_sizes": (results.has(f"small/{PROXY_KD}"), _sizes),
        "fig_4_top_k": (results.has(f"proxy/{px.RAW}", "top_mass_10"), _top_k),
        "fig_5_agreement": (results.has(f"proxy/{px.PREFERENCE}"), _agreement),
        "fig_6_curves": (_has_curves(results, ""), lambda plt, r: _curves(plt, r, "")),
        "fig_7_curves": (_has_curves(results, "qwen/"), lambda plt, r: _curves(plt, r, "qwen/")),
    }
    written = []
    with plotting() as plt:
        for name, (possible, make) in plans.items():
            if not possible:
                continue
            figure = make(plt, results)
            figure.suptitle(f"regime {results.regime}, preset {results.preset}", fontsize=9)
            written += save(plt, figure, out / f"{name}_{results.regime}_{results.preset}")
    return written


def _students(plt: Any, results: Results) -> Any:
    """Draws differences from black-box KD with three paired standard errors."""
    names = [name for name in METHODS if results.has(name) and name != BLACK_BOX]
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.28 * len(names) + 1.2), sharey=True)
    for axis, metric in zip(axes, (ACCURACY, KL), strict=True):
        for checkpoint, colour, shift in ((BEST, GREEN, 0.13), (LAST, GREY, -0.13)):
            found = [results.difference(name, BLACK_BOX, checkpoint, metric) for name in names]
            axis.errorbar(
                [each.mean for each in found],
                [shift - place for place in range(len(names))],
                xerr=[MANY_ERRORS * (each.error or 0) for each in found],
                fmt="o",
                markersize=4,
                color=colour,
                label=f"{checkpoint} checkpoint",
            )
        axis.axvline(0, color=BLACK, linewidth=1)
        axis.set_title(f"{metric} minus black-box KD's")
        if metric == KL:  # A student that never stops may end ten times as far away as others.
            axis.set_xscale("symlog", linthresh=1)
    axes[0].set_yticks([-place for place in range(len(names))], [label_of(n) for n in names])
    axes[0].set_xlabel("bars: three paired standard errors")
    axes[1].legend(frameon=False)
    return figure


def _sizes(plt: Any, results: Results) -> Any:
    """Draws the accuracy of proxy and student for both sizes of the proxy."""
    figure, axis = plt.subplots(figsize=(5, 3.4))
    pairs = (("proxy", ""), ("small", "small/"))
    for place, (proxy, prefix) in enumerate(pairs):
        for shift, name, colour in (
            (-0.18, f"{proxy}/{px.PREFERENCE}", GREY),
            (0.18, f"{prefix}{PROXY_KD}", GREEN),
        ):
            found = results.mean(name, BEST, ACCURACY)
            axis.bar(place + shift, found.mean, 0.34, yerr=found.error, color=colour)
    axis.set_xticks([0, 1], ["proxy of 103k parameters", "proxy of 28k parameters"])
    axis.set_title("Fig. 3: accuracy of the aligned proxy (grey) and its student (green)")
    return figure


def _top_k(plt: Any, results: Results) -> Any:
    figure, axis = plt.subplots(figsize=(5, 3.4))
    for state in (px.RAW, px.PREFERENCE):
        means = [results.mean(f"proxy/{state}", BEST, f"top_mass_{k}").mean for k in TOP_KS]
        axis.plot(TOP_KS, means, marker="o", color=STATES[state], label=STATE_LABELS[state])
    axis.set_title("Fig. 4: share of places whose top K hold more than 0.95")
    axis.set_xlabel("K")
    axis.legend(frameon=False)
    return figure


def _agreement(plt: Any, results: Results) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4))
    for axis, metric, title in zip(
        axes,
        (AGREEMENT, KL),
        ("Fig. 5: top-1 agreement with the teacher's tokens", "Table 4: KL(teacher || proxy)"),
        strict=True,
    ):
        for place, (state, colour) in enumerate(STATES.items()):
            found = results.mean(f"proxy/{state}", BEST, metric)
            axis.bar(place, found.mean, 0.6, yerr=found.error, color=colour)
        axis.set_xticks(range(len(STATES)), list(STATE_LABELS.values()), fontsize=8)
        axis.set_title(title)
    return figure


def _has_curves(results: Results, prefix: str) -> bool:
    return len(results.checkpoints(prefix + PROXY_KD, ACCURACY)) > 2


def _curves(plt: Any, results: Results, prefix: str) -> Any:
    figure, axis = plt.subplots(figsize=(5.4, 3.4))
    for name, colour in CURVES.items():
        points = [
            (
                int(checkpoint.removeprefix("step_")),
                results.mean(prefix + name, checkpoint, ACCURACY),
            )
            for checkpoint in results.checkpoints(prefix + name, ACCURACY)
            if checkpoint not in (BEST, LAST)
        ]
        if points:
            steps, found = zip(*points, strict=True)
            errors = [each.error or 0 for each in found]
            means = [each.mean for each in found]
            axis.errorbar(steps, means, yerr=errors, color=colour, marker="o", label=label_of(name))
    axis.set_title(f"Fig. {7 if prefix else 6}: greedy accuracy during distillation")
    axis.set_xlabel("steps")
    axis.legend(frameon=False)
    return figure
