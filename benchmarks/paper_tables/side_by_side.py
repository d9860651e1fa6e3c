"""The head of ``tables.md``: all regimes beside each other, so that none stands for the others."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.paper_tables.labels import STATE_LABELS, label_of, markdown
from benchmarks.paper_tables.methods import BLACK_BOX, BLACK_BOX_ALL, METHODS, OF_PRESET, PROXY_KD
from benchmarks.paper_tables.metrics import ACCURACY, AGREEMENT, BEST, KL, LAST
from benchmarks.paper_tables.statistics import (
    CHECKPOINTS,
    WITHIN_NOISE,
    Results,
    difference_between,
    verdict_of,
    verdicts,
)

_NOISE = "noise"
_VERDICTS_NOTE = (
    "One word where accuracy and KL agree, else accuracy / KL; noise: within noise. Empty: no "
    "preset changes either side, or it was not measured."
)
_STUDENTS_NOTE = (
    "Mean ± standard error over seeds at the best checkpoint; after the stroke the last one, where "
    "its mean is another."
)


def sections(all_results: Sequence[Results]) -> list[str]:
    """Lines of Markdown: verdicts, the recommended preset, students and proxies."""
    lines = ["## Verdicts, side by side", "", _VERDICTS_NOTE, "", *_verdicts(all_results)]
    compared = _presets(all_results)
    if compared:
        lines += ["", "## The recommended preset against the paper's", "", *compared]
    for preset in dict.fromkeys(results.preset for results in all_results):
        cells = [results for results in all_results if results.preset == preset]
        names = ("teacher", "student", *METHODS) if cells[0] is all_results[0] else OF_PRESET
        lines += ["", f"## Students side by side, preset {preset}", "", _STUDENTS_NOTE, ""]
        lines += _students(cells, names)
    lines += ["", "## Proxies side by side, best checkpoint", "", *_proxies(all_results)]
    return lines


def _verdicts(all_results: Sequence[Results]) -> list[str]:
    """Every claim in every regime and preset."""
    said: dict[tuple[str, str], dict[str, list[str]]] = {}
    heads = [f"{results.regime}, {results.preset}" for results in all_results]
    for head, results in zip(heads, all_results, strict=True):
        for claim, _, found in verdicts(results):
            by_head = said.setdefault((claim.text, claim.source), {})
            if _is_first(results, all_results) or {claim.better, claim.worse} & set(OF_PRESET):
                by_head.setdefault(head, []).append(found)
    rows = [
        [*claim, *(_in_short(by_head.get(head, [])) for head in heads)]
        for claim, by_head in said.items()
        if by_head
    ]
    return markdown(["claim", "source", *heads], rows)


def _in_short(found: Sequence[str]) -> str:
    words = [_NOISE if word == WITHIN_NOISE else word for word in found]
    return " / ".join(words if len(set(words)) > 1 else words[:1])


def _is_first(results: Results, all_results: Sequence[Results]) -> bool:
    """Whether it is its regime's first preset, which shows what no preset changes."""
    return next(r for r in all_results if r.regime == results.regime) is results


def _students(cells: Sequence[Results], names: Sequence[str]) -> list[str]:
    columns = list(itertools.product(cells, (ACCURACY, KL)))
    rows = [
        [label_of(name), *(_both(results, name, metric) for results, metric in columns)]
        for name in names
        if any(results.has(name) for results in cells)
    ]
    return markdown(["", *_heads(columns)], rows)


def _heads(columns: Sequence[tuple[Results, str]]) -> list[str]:
    return [f"{results.regime}: {metric}" for results, metric in columns]


def _both(results: Results, name: str, metric: str) -> str:
    if not results.has(name, metric):
        return ""
    best, last = (results.mean(name, checkpoint, metric) for checkpoint in (BEST, LAST))
    same = f"{best.mean:.3f}" == f"{last.mean:.3f}"
    return str(best) if same else f"{best} / {last.mean:.3f}"


def _proxies(all_results: Sequence[Results]) -> list[str]:
    cells = [results for results in all_results if _is_first(results, all_results)]
    columns = list(itertools.product(cells, (KL, ACCURACY, AGREEMENT)))

    def cell(name: str, results: Results, metric: str) -> str:
        return str(results.mean(name, BEST, metric)) if results.has(name, metric) else ""

    rows = [
        [label, *(cell(f"proxy/{state}", *column) for column in columns)]
        for state, label in STATE_LABELS.items()
    ]
    return markdown(["proxy", *_heads(columns)], rows)


def _presets(all_results: Sequence[Results]) -> list[str]:
    """The students of the recommended preset against the paper's, regime by regime."""
    by_cell = {(results.regime, results.preset): results for results in all_results}
    better, worse = (PROXY_KD, "proxy_kd_mix"), (PROXY_KD, BLACK_BOX, BLACK_BOX_ALL)
    rows = []
    for (regime, preset), paper in by_cell.items():
        recommended = by_cell.get((regime, "recommended"))
        if preset != "paper" or recommended is None:
            continue
        for one, other, metric in itertools.product(better, worse, (ACCURACY, KL)):
            if recommended.has(one) and paper.has(other):
                sides = ((recommended, one), (paper, other))
                found = [difference_between(*sides, c, metric) for c in CHECKPOINTS]
                claim = f"recommended {label_of(one)} > {label_of(other)}"
                intervals = [each.with_interval() for each in found]
                rows.append([regime, claim, metric, *intervals, verdict_of(found, metric)])
    head = ["regime", "claim", "metric", "Δ best", "Δ last", "verdict"]
    return markdown(head, rows) if rows else []
