"""``tables.md``: what was measured, difference by difference, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables import side_by_side
from benchmarks.paper_tables.labels import STATE_LABELS, label_of, markdown
from benchmarks.paper_tables.methods import (
    ABLATIONS,
    BASELINES,
    BEYOND,
    BLACK_BOX,
    CONTROLS,
    METHODS,
)
from benchmarks.paper_tables.metrics import ACCURACY, AGREEMENT, BEST, KL, LAST, SWEEP, Record
from benchmarks.paper_tables.statistics import (
    CHECKPOINTS,
    Results,
    verdicts,
)

READING = (
    "Mean ± standard error over seeds; Δ are paired by seed, against black-box KD on D_s. best: "
    "lowest validation NLL; last: final step; in brackets intervals of 95 %. KL: exact "
    "KL(teacher || model), nats a token, on the teacher's test answers. Accuracy: greedy answers "
    "to unseen prompts."
)
_COLUMNS = tuple((metric, checkpoint) for metric in (ACCURACY, KL) for checkpoint in CHECKPOINTS)


def write_tables(
    records: Sequence[Record],
    cells: Iterable[tuple[str, str]],
    *,
    command: str,
    notes: Sequence[str],
) -> str:
    """The whole file.

    Args:
      records: of all cells.
      cells: (regime, preset), each a section.
      command: that makes the numbers.
      notes: lines of the head: sizes, seeds, time.
    """
    lines = ["# The paper's tables in miniature", "", f"    {command}", "", *notes, ""]
    all_results = [Results(records, *cell) for cell in cells]
    lines += side_by_side.sections(all_results)
    for results in all_results:
        lines += ["", f"## Regime {results.regime}, preset {results.preset}", ""]
        lines += _section(results)
    return "\n".join(lines) + "\n"


def _section(results: Results) -> list[str]:
    lines = []
    start = [name for name in ("teacher", "student") if results.has(name)]
    lines += ["### Table 1: students", "", *_students(results, start, BASELINES)]
    lines += ["", "### Controls, always beside it", "", *_students(results, [], CONTROLS)]
    proxy = ["proxy_kd"] if results.has("proxy_kd") else []
    lines += ["", "### Table 2: ablations", ""]
    lines += _students(results, [*proxy, BLACK_BOX], ABLATIONS)
    if any(METHODS[name][1] == BEYOND for name in results.methods() if name in METHODS):
        lines += ["", "### Beyond the paper", "", *_students(results, [], BEYOND)]
    lines += ["", "### Table 4 and Fig. 5: the proxy", "", *_proxies(results, "proxy")]
    for prefix, title in (
        ("small/", "Fig. 3: a proxy of the student's size"),
        ("qwen/", "Table 5: Qwen"),
    ):
        names = [name for name in results.methods() if name.startswith(prefix)]
        if names:
            lines += ["", f"### {title}", "", *_rows(results, names, baseline=None)]
    lines += _sweeps(results)
    lines += _times(results)
    lines += ["", "### Verdicts", "", *_verdicts(results)]
    return lines


def _students(results: Results, first: Sequence[str], group: str) -> list[str]:
    names = [name for name, (_, its) in METHODS.items() if its == group and results.has(name)]
    return _rows(results, [*first, *names], baseline=BLACK_BOX)


def _rows(results: Results, names: Sequence[str], baseline: str | None) -> list[str]:
    head = ["", *(f"{metric}, {checkpoint}" for metric, checkpoint in _COLUMNS), "agreement, best"]
    paired = baseline is not None and results.has(baseline)
    if paired:
        head += [f"Δ{metric}, {checkpoint}" for metric, checkpoint in _COLUMNS]
    rows = []
    for name in names:
        if not results.has(name):
            continue
        cells = [label_of(name)]
        cells += [str(results.mean(name, checkpoint, metric)) for metric, checkpoint in _COLUMNS]
        cells.append(str(results.mean(name, BEST, AGREEMENT)))
        if paired and baseline is not None:
            for metric, checkpoint in _COLUMNS:
                found = results.difference(name, baseline, checkpoint, metric)
                cells.append("" if name == baseline else found.signed())
        rows.append(cells)
    return markdown(head, rows)


def _proxies(results: Results, prefix: str) -> list[str]:
    head = ["proxy", "KL, best", "KL, last", "ΔKL to + L_NLL, best", "ΔKL, last"]
    head += ["accuracy, best", "agreement, best", "agreement, last"]
    rows = []
    for state, label in STATE_LABELS.items():
        name, nll = f"{prefix}/{state}", f"{prefix}/{px.NLL}"
        if not results.has(name):
            continue
        differences = [results.difference(name, nll, c, KL).signed() for c in CHECKPOINTS]
        rows.append(
            [
                label,
                *(str(results.mean(name, checkpoint, KL)) for checkpoint in CHECKPOINTS),
                *(["", ""] if state == px.NLL else differences),
                str(results.mean(name, BEST, ACCURACY)),
                *(str(results.mean(name, checkpoint, AGREEMENT)) for checkpoint in CHECKPOINTS),
            ]
        )
    return markdown(head, rows)


def _sweeps(results: Results) -> list[str]:
    """Each changed student or proxy with its differences from the same without the change."""
    rows = []
    for name in results.methods():
        if not name.startswith(SWEEP) or not results.has(name):
            continue
        changed = name.split("/", 1)[1]
        base = changed if changed in METHODS else f"proxy/{changed}"
        rows.append(
            [
                label_of(name),
                *(str(results.mean(name, c, metric)) for metric, c in _COLUMNS),
                *(
                    results.difference(name, base, c, metric).with_interval()
                    for metric, c in _COLUMNS
                ),
            ]
        )
    if not rows:
        return []
    plain, paired = (f"{metric}, {checkpoint}" for metric, checkpoint in _COLUMNS), _COLUMNS
    head = ["", *plain, *(f"Δ{metric}, {checkpoint}" for metric, checkpoint in paired)]
    note = "Δ are paired by seed, against the same without the change, with intervals of 95 %."
    return ["", "### Sweeps: one change each", "", note, "", *markdown(head, rows)]


def _times(results: Results) -> list[str]:
    rows = []
    for name in results.methods():
        for metric in ("seconds_a_round", "seconds"):
            if metric == "seconds_a_round" and LAST in results.checkpoints(name, metric):
                rows.append([f"{name}, a round", f"{results.mean(name, LAST, metric).mean:.2f}"])
            elif LAST in results.checkpoints(name, metric):
                rows.append(
                    [f"student, {label_of(name)}", f"{results.mean(name, LAST, metric).mean:.2f}"]
                )
    if not rows:
        return []
    note = "Wall-clock seconds a seed; of a round without the first, of a student all its steps."
    return ["", "### Table 3: time", "", note, "", *markdown(["", "seconds"], rows)]


def _verdicts(results: Results) -> list[str]:
    rows = []
    for claim, metric, found in verdicts(results):
        differences = [
            results.difference(claim.better, claim.worse, checkpoint, metric).with_interval()
            for checkpoint in CHECKPOINTS
        ]
        rows.append([claim.text, claim.source, metric, *differences, found])
    return markdown(["claim", "source", "metric", "Δ best", "Δ last", "verdict"], rows)
