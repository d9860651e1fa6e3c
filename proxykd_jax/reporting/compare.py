"""Compares several runs: settings that differ, results, and curves in shared plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from proxykd_jax.reporting.blocks import (
    Block,
    LinePlot,
    Plots,
    Section,
    Series,
    Table,
    Text,
    Value,
)
from proxykd_jax.reporting.curves import points, thinned
from proxykd_jax.reporting.proxy import MODELS, splits_of
from proxykd_jax.reporting.run_folder import RunFolder

# (stage, title, name in the log, whether its points are marked)
_CURVES = (
    ("align", "Proxy: NLL on validation rows, nats", "validation/nll", True),
    ("align", "Proxy: top-1 agreement, validation rows", "validation/agreement", True),
    ("align", "Proxy: preference loss, training batch", "preference", False),
    ("align", "Proxy: reward margin, training batch", "reward_margin", False),
    ("distill", "Student: NLL on validation rows, nats", "validation/nll", True),
    ("distill", "Student: top-1 agreement, validation rows", "validation/agreement", True),
    ("distill", "Student: NLL, training batch", "nll", False),
    ("distill", "Student: weighted KL, training batch", "weighted_kl", False),
)
_ABSENT = "(absent)"


def settings(runs: Sequence[RunFolder]) -> Section:
    """Keys whose values differ between the runs."""
    flat = [dict(_flattened(run.settings)) for run in runs]
    keys = list(dict.fromkeys(key for found in flat for key in found))
    rows: list[tuple[Value, ...]] = []
    for key in keys:
        values = [found.get(key, _ABSENT) for found in flat]
        if any(value != values[0] for value in values):
            rows.append((key, *values))
    versions = [
        ", ".join(sorted({str(m.get("code_version")) for m in run.manifests.values()}))
        for run in runs
    ]
    if len({version for version in versions if version}) > 1:
        rows.append(("code version", *versions))
    if not rows:
        return Section("Settings that differ", [Text("The runs have the same settings.")])
    table = Table(f"{len(rows)} of {len(keys)} keys", ("key", *(run.label for run in runs)), rows)
    return Section("Settings that differ", [table])


def _flattened(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _flattened(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list) and any(isinstance(value, dict) for value in node):
        for number, value in enumerate(node):
            yield from _flattened(value, f"{key}.{number}")
    else:
        text = node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)
        yield key, text


def figures(runs: Sequence[RunFolder]) -> Section:
    """Final figures, and their differences from the first run's."""
    blocks: list[Block] = []
    found = [run.summary.get("models", {}) for run in runs]
    for measure, title in (("agreement", "Top-1 agreement with the teacher"),
                           ("nll", "Teacher-token NLL, nats"),
                           ("kl", "KL(teacher || model), nats per token")):  # fmt: skip
        rows: list[tuple[Value, ...]] = []
        for name, called in MODELS.items():
            for split in splits_of(
                {str(i): models.get(name, {}) for i, models in enumerate(found)}
            ):
                values = [
                    models.get(name, {}).get(split, {}).get(measure, {}).get("token_mean")
                    for models in found
                ]
                if any(value is not None for value in values):
                    rows.append((called, split, *_with_differences(values)))
        if rows:
            header = ("model", "rows of", *_header(runs))
            blocks.append(Table(title, header, rows, _NOTE, digits=4))
    rows = []
    for stage, role in (("proxy", "proxy"), ("student", "student")):
        for key, what in (("best_nll", "lowest validation NLL"), ("best_step", "at step"),
                          ("last_step", "steps taken")):  # fmt: skip
            values = [run.manifests.get(stage, {}).get(key) for run in runs]
            if any(value is not None for value in values):
                rows.append((f"{role}: {what}", *_with_differences(values)))
    if rows:
        header = ("training", *_header(runs))
        blocks.append(Table("Training", header, rows, digits=4))
    if not blocks:
        blocks.append(Text("No run has final figures.", missing=True))
    return Section("Final figures", blocks)


_NOTE = (
    "Differences are from the first run. They are not paired, because runs with other corpora are "
    "measured on other rows."
)


def _header(runs: Sequence[RunFolder]) -> Iterator[str]:
    for place, run in enumerate(runs):
        yield run.label
        if place:
            yield f"{run.label} − {runs[0].label}"


def _with_differences(values: Sequence[Any]) -> Iterator[Value]:
    for place, value in enumerate(values):
        yield value
        if place:
            yield None if value is None or values[0] is None else value - values[0]


def curves(runs: Sequence[RunFolder]) -> Section:
    """The same figure of all runs in one plot."""
    plots = []
    for stage, title, name, marked in _CURVES:
        series, widest = [], 1
        for run in runs:
            xs, ys, width = thinned(*points(run.of_stage(stage), name))
            widest = max(widest, width)
            if xs:
                series.append(Series(run.label, xs, ys, points=marked and width == 1))
        if series:
            note = f"Points are means over up to {widest} steps." if widest > 1 else ""
            plots.append(LinePlot(title, "step", series, note=note))
    if not plots:
        return Section("Curves", [Text("No run has logged a step.", missing=True)])
    return Section("Curves", [Plots(plots)])
