"""The head of ``tables.md``: all regimes beside each other, so that none stands for the others."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

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


def sections(all_results: Sequence[Results]) -> list[str]:
    """Lines of Markdown: verdicts, the recommended preset, students and proxies."""
    lines = ["## Verdicts, side by side", "", _VERDICTS_NOTE, "", *_verdicts(all_results)]
    compared = _presets(all_results)
    if compared:
        lines += ["", "## The recommended preset against the paper's", "", *compared]
    for preset in dict.fromkeys(results.preset for results in all_results):
        cells = [results for results in all_results if results.preset == preset]
        lines += ["", f"## Students side by side, preset {preset}", "", _STUDENTS_NOTE, ""]
        lines += _students(cells, own_alone=cells[0] is not all_results[0])
    lines += ["", "## Proxies side by side, best checkpoint", "", *_proxies(all_results)]
    return lines


_VERDICTS_NOTE = (
    "One word where accuracy and KL agree, else accuracy / KL; noise: within noise. Empty: no "
    "preset changes either side, or it was not measured."
)
_STUDENTS_NOTE = (
    "Mean ± standard error over seeds at the best checkpoint; after the stroke the last one, where "
    "its mean is another."
)


def _verdicts(all_results: Sequence[Results]) -> list[str]:
    """Every claim in every regime and preset."""
    said: dict[str, dict[str, list[str]]] = {}
    sources: dict[str, str] = {}
    for results in all_results:
        head = f"{results.regime}, {results.preset}"
        is_first = _is_first(results, all_results)
        for claim, _, found in verdicts(results):
            sources[claim.text] = claim.source
            if is_first or {claim.better, claim.worse} & set(OF_PRESET):
                said.setdefault(claim.text, {}).setdefault(head, []).append(found)
    heads = [f"{results.regime}, {results.preset}" for results in all_results]
    rows = [
        [text, sources[text], *(_in_short(by_head.get(head, [])) for head in heads)]
        for text, by_head in said.items()
    ]
    return markdown(["claim", "source", *heads], rows)


def _in_short(found: Sequence[str]) -> str:
    words = [_NOISE if word == WITHIN_NOISE else word for word in found]
    return " / ".join(words if len(set(words)) > 1 else words[:1])


def _is_first(results: Results, all_results: Sequence[Results]) -> bool:
    """Whether it is its regime's first preset, which shows what no preset changes."""
    return next(r for r in all_results if r.regime == results.regime) is results


def _students(cells: Sequence[Results], *, own_alone: bool) -> list[str]:
    names = OF_PRESET if own_alone else ("teacher", "student", *METHODS)
    head = [f"{results.regime}: {metric}" for results in cells for metric in (ACCURACY, KL)]
    rows = [
        [
            label_of(name),
            *(_both(r, name, metric) for r in cells for metric in (ACCURACY, KL)),
        ]
        for name in names
        if any(results.has(name) for results in cells)
    ]
    return markdown(["", *head], rows)


def _both(results: Results, name: str, metric: str) -> str:
    if not results.has(name, metric):
        return ""
    best, last = (results.mean(name, checkpoint, metric) for checkpoint in (BEST, LAST))
    same = f"{best.mean:.3f}" == f"{last.mean:.3f}"
    return str(best) if same else f"{best} / {last.mean:.3f}"


def _proxies(all_results: Sequence[Results]) -> list[str]:
    cells = [results for results in all_results if _is_first(results, all_results)]
    metrics = (KL, ACCURACY, AGREEMENT)
    head = [f"{results.regime}: {metric}" for results in cells for metric in metrics]
    rows = [
        [
            label,
            *(
                str(results.mean(f"proxy/{state}", BEST, metric))
                if results.has(f"proxy/{state}", metric)
                else ""
                for results in cells
                for metric in metrics
            ),
        ]
        for state, label in STATE_LABELS.items()
    ]
    return markdown(["proxy", *head], rows)


def _presets(all_results: Sequence[Results]) -> list[str]:
    """The students of the recommended preset against the paper's, regime by regime."""
    by_cell = {(results.regime, results.preset): results for results in all_results}
    rows = []
    for (regime, preset), paper in by_cell.items():
        recommended = by_cell.get((regime, "recommended"))
        if preset != "paper" or recommended is None:
            continue
        for better, worse, metric in _compared():
            if not (recommended.has(better) and paper.has(worse)):
                continue
            found = [
                difference_between((recommended, better), (paper, worse), checkpoint, metric)
                for checkpoint in CHECKPOINTS
            ]
            rows.append(
                [
                    regime,
                    f"recommended {label_of(better)} > {label_of(worse)}",
                    metric,
                    *(each.with_interval() for each in found),
                    verdict_of(found, metric),
                ]
            )
    head = ["regime", "claim", "metric", "Δ best", "Δ last", "verdict"]
    return markdown(head, rows) if rows else []


def _compared() -> Iterable[tuple[str, str, str]]:
    better, worse = (PROXY_KD, "proxy_kd_mix"), (PROXY_KD, BLACK_BOX, BLACK_BOX_ALL)
    return itertools.product(better, worse, (ACCURACY, KL))
