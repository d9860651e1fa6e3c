"""Soft labels and their weights, the student's training, and the student beside the proxy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from proxykd_jax.data.corpus import SPLITS
from proxykd_jax.data.soft_labels import SoftLabelStore, open_soft_labels, weights_of
from proxykd_jax.reporting.benchmark_tables import Score, read_benchmarks
from proxykd_jax.reporting.blocks import (
    BarPlot,
    Block,
    Fold,
    Histogram,
    LinePlot,
    Plots,
    Section,
    Series,
    Table,
    Text,
    Value,
    shown,
)
from proxykd_jax.reporting.curves import (
    held_out_kind,
    other_figures,
    phase_ends,
    plot,
    points,
)
from proxykd_jax.reporting.proxy import opening, splits_of
from proxykd_jax.reporting.run_folder import RunFolder

_BINS = 24
SHOWN = {
    *("nll", "loss", "kl", "weighted_kl", "sample_weight", "grad_norm", "rows", "planned_steps"),
    *("validation/nll", "validation/agreement"),
}
_ONCE = ("weights/", "samples/")
# Names that evaluate may give the trained models, the likeliest first.
_ALIGNED = ("proxy_aligned", "proxy", "proxy_best", "proxy_last", "proxy_exported")
_TRAINED = ("student", "student_best", "student_last", "student_exported")


def soft_labels(run: RunFolder) -> Section:
    """Likelihoods of the answers under the proxy, and the resulting weights of eq. 9."""
    title = "Soft labels and weights"
    absent = run.absent("soft_labels")
    if absent is not None:
        return Section(title, [Text(absent, missing=True)])
    store = open_soft_labels(run.folder / "soft_labels")
    known = (*SPLITS, *store.figures)
    splits = [name for name in dict.fromkeys(known) if store.figures.get(name, {}).get("rows")]
    settings = run.setting("distill.weights") or {}
    kind = settings.get("loglik", "sum")
    blocks: list[Block] = [_figures(store, splits, kind)]
    if not settings.get("enabled", True):
        blocks.append(Text("The weights are switched off: all rows count equally."))
    else:
        learnt = [split for split in splits if split in _weighted(run)]
        blocks.append(Plots([_weights(store, split, settings) for split in learnt]))
    return Section(title, blocks)


def _weighted(run: RunFolder) -> tuple[str, ...]:
    """Splits with the teacher's texts; the proxy's own answers have weight 1."""
    return ("distill",) if run.setting("distill.data") == "distill" else (
        "warmup", "align", "distill")  # fmt: skip


def _figures(store: SoftLabelStore, splits: list[str], kind: str) -> Table:
    rows: list[tuple[Value, ...]] = []
    for split in splits:
        found = store.figures[split]
        rows.append((
            split, found.get("rows"), found.get("tokens"),
            *(found.get(f"{kind}/{name}") for name in ("loglik_mean", "loglik_std")),
            *(found.get(f"{k}/weight_length_correlation") for k in ("sum", "token_mean")),
            found.get("large_mass_share"),
        ))  # fmt: skip
    header = (
        *("split", "rows", "tokens", "mu", "gamma"),
        *("correlation with length: sum", "token mean", f"top-{store.top_k} mass > 0.95"),
    )
    note = (
        f"mu and gamma of the log-likelihoods ({kind}), nats. The correlation is that of the "
        "weights with the answers' lengths: near −1 they are a bonus for short answers."
    )
    return Table("By split", header, rows, note, digits=3)


def _weights(store: SoftLabelStore, split: str, settings: dict[str, Any]) -> Histogram:
    weights = weights_of(
        store.seq_logliks(split),
        store.lengths(split),
        store.finished(split),
        loglik=settings.get("loglik", "sum"),
        normalize=settings.get("normalize", False),
    )
    values = weights.sample_weight.astype(np.float64)
    top = float(values.max()) or 1.0
    counts, edges = np.histogram(values, bins=_BINS, range=(0.0, top))
    return Histogram(
        f"Weights of {split} ({len(values):,} rows)", "weight", edges.tolist(), counts.tolist(),
        [(float(values.mean()), "mean")],
        f"Correlation with the answers' lengths {shown(weights.length_correlation, 2)}.",
    )  # fmt: skip


def training(run: RunFolder) -> Section:
    """Losses and validation by step; benchmark curves if any were logged (Figs. 6 and 7)."""
    title, lines = "Distillation of the student", run.of_stage("distill")
    best, blocks = opening(run, "student", lines)
    if not lines:
        return Section(title, blocks)
    kind = held_out_kind(lines)
    ends = phase_ends(lines)
    ends = ends if len(ends) > 1 else []
    plots = [
        plot(lines, "NLL of the teacher's answers, nats",
             [("training batch", "nll", False), ("validation rows", f"{kind}/nll", True)],
             best=(f"{kind}/nll", best, "best"), ends=ends),
        plot(lines, "KL to the soft labels, nats",
             [("plain", "kl", False), ("weighted (eq. 10)", "weighted_kl", False)], ends=ends),
        plot(lines, "Loss", [("training batch", "loss", False)], ends=ends),
        plot(lines, "Top-1 agreement with the teacher, validation rows",
             [("validation rows", f"{kind}/agreement", True)], ends=ends),
        plot(lines, "Norm of the gradient", [("before clipping", "grad_norm", False)], ends=ends),
        *_benchmark_curves(run),
    ]  # fmt: skip
    blocks.append(Plots([found for found in plots if found is not None]))
    return Section(title, blocks)


def _benchmark_curves(run: RunFolder) -> list[LinePlot]:
    """Accuracies that were logged during the student's training: ``benchmark/<name>``."""
    lines = run.of_stage("distill")
    names = sorted({name for line in lines for name in line if name.startswith("benchmark/")})
    series = []
    for name in names:
        steps, shares = points(lines, name)
        percent = [100 * share for share in shares]
        series.append(Series(name.partition("/")[2], steps, percent, points=True))
    series = [one for one in series if one.xs]
    return [LinePlot("Accuracy on benchmarks, %", "step", series)] if series else []


def other_series(run: RunFolder, stage: str, shown: set[str]) -> Fold | None:
    """All other figures of a stage, hidden until opened."""
    found = [
        figure
        for name, figure in other_figures(run, stage, shown)
        if not name.startswith((*_ONCE, "benchmark/"))
    ]
    if not found:
        return None
    return Fold(f"Other figures that {stage} logged ({len(found)})", [Plots(found)])


def beside_the_proxy(run: RunFolder) -> Section:
    """Student and proxy on the same rows and benchmarks (Fig. 3)."""
    title, blocks = "Student beside proxy", list[Block]()
    scores = read_benchmarks(run)
    if scores:
        tasks = list(dict.fromkeys(task for found in scores.values() for task in found))
        bars = [(name, [_bar(found.get(task)) for task in tasks]) for name, found in scores.items()]
        blocks.append(Plots([BarPlot("Accuracy of student and proxy, %", tasks, bars)]))
    rows = [*_measured_gaps(run.summary.get("models", {})), *_benchmark_gaps(scores)]
    if rows:
        header = ("measure", "proxy", "student", "gap", "gap / proxy")
        blocks.append(Table("Gap between aligned proxy and student", header, rows))
    if not blocks:
        text = "There are no figures of both an aligned proxy and a student."
        blocks.append(Text(text, missing=True))
    return Section(title, blocks)


def _bar(score: Score | None) -> tuple[float, float | None] | None:
    return None if score is None else (score.accuracy, score.error)


def _measured_gaps(models: dict[str, Any]) -> Iterator[tuple[Value, ...]]:
    if not {"proxy_aligned", "student"} <= set(models):
        return
    for split in splits_of({name: models[name] for name in ("proxy_aligned", "student")}):
        proxy, student = (
            models[name].get(split, {}).get("agreement", {}).get("token_mean")
            for name in ("proxy_aligned", "student")
        )
        if proxy is not None and student is not None:
            yield _gap(f"top-1 agreement, {split} rows", proxy, student)


def _benchmark_gaps(scores: dict[str, dict[str, Score]]) -> Iterator[tuple[Value, ...]]:
    proxy, student = (next((scores[name] for name in names if name in scores), {})
                      for names in (_ALIGNED, _TRAINED))  # fmt: skip
    both = [task for task in student if task in proxy]
    for task in both:
        yield _gap(f"{task}, %", proxy[task].accuracy, student[task].accuracy)
    if len(both) > 1:
        means = [sum(found[task].accuracy for task in both) / len(both)
                 for found in (proxy, student)]  # fmt: skip
        yield _gap(f"mean of {len(both)} benchmarks, %", *means)


def _gap(name: str, proxy: float, student: float) -> tuple[Value, ...]:
    gap = proxy - student
    return name, proxy, student, gap, gap / proxy if proxy else None
