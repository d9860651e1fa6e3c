"""``tables.md``: what was measured, the differences, and the verdicts that follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper_tables import figures, side_by_side
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.labels import STATE_LABELS, label_of, markdown
from benchmarks.paper_tables.methods import (
    ABLATIONS,
    BASELINES,
    BEYOND,
    BLACK_BOX,
    CONTROLS,
    METHODS,
    PROXY_KD,
)
from benchmarks.paper_tables.metrics import ACCURACY, AGREEMENT, BEST, KL, LAST, SWEEP, Record
from benchmarks.paper_tables.statistics import CHECKPOINTS, Results, verdicts
from proxykd_jax.artifacts import write_bytes, write_json

READING = (
    "Mean ± standard error over seeds; Δ are paired by seed, against black-box KD on D_s. best: "
    "lowest validation NLL; last: final step; in brackets intervals of 95 %. KL: exact "
    "KL(teacher || model), nats a token, on the teacher's test answers. Accuracy: greedy answers "
    "to unseen prompts."
)
_COLUMNS = tuple((metric, checkpoint) for metric in (ACCURACY, KL) for checkpoint in CHECKPOINTS)
_HEADS = [f"{metric}, {checkpoint}" for metric, checkpoint in _COLUMNS]
_CHANGES = [f"Δ{head}" for head in _HEADS]


def write_all(
    out: Path,
    records: Sequence[Record],
    cells: Sequence[tuple[str, str]],
    *,
    command: str,
    notes: Sequence[str],
) -> str:
    """Writes ``tables.json``, ``tables.md`` and the figures; returns the text of ``tables.md``."""
    write_json(out / "tables.json", [record.to_json() for record in records])
    text = write_tables(records, cells, command=command, notes=notes)
    write_bytes(out / "tables.md", text.encode())
    for cell in cells:
        figures.draw(out, Results(records, *cell))
    return text


def write_tables(
    records: Sequence[Record],
    cells: Sequence[tuple[str, str]],
    *,
    command: str,
    notes: Sequence[str],
) -> str:
    """The text of ``tables.md``.

    Args:
      records: those of all cells.
      cells: (regime, preset) of each section.
      command: the command that makes the numbers.
      notes: the lines of the head, with sizes, seeds and time.
    """
    lines = ["# The paper's tables in miniature", "", f"    {command}", "", *notes, ""]
    all_results = [Results(records, *cell) for cell in cells]
    lines += side_by_side.sections(all_results)
    for results in all_results:
        lines += ["", f"## Regime {results.regime}, preset {results.preset}", ""]
        lines += _section(results)
    return "\n".join(lines) + "\n"


def _section(results: Results) -> list[str]:
    start = [name for name in ("teacher", "student") if results.has(name)]
    proxy = [PROXY_KD] if results.has(PROXY_KD) else []
    beyond = _group(results, BEYOND)
    parts = [
        ("Table 1: students", _rows(results, [*start, *_group(results, BASELINES)])),
        ("Controls, always beside it", _rows(results, _group(results, CONTROLS))),
        (
            "Table 2: ablations",
            _rows(results, [*proxy, BLACK_BOX, *_group(results, ABLATIONS)]),
        ),
        ("Beyond the paper", _rows(results, beyond) if beyond else []),
        ("Table 4 and Fig. 5: the proxy", _proxies(results, "proxy")),
    ]
    for prefix, title in (
        ("small/", "Fig. 3: a proxy of the student's size"),
        ("qwen/", "Table 5: Qwen"),
    ):
        names = [name for name in results.methods() if name.startswith(prefix)]
        parts.append((title, _rows(results, names, paired=False) if names else []))
    parts += [
        ("Sweeps: one change each", _sweeps(results)),
        ("Table 3: time", _times(results)),
        ("Verdicts", _verdicts(results)),
    ]
    lines = [["", f"### {title}", "", *rows] for title, rows in parts if rows]
    return [line for part in lines for line in part][1:]


def _group(results: Results, group: str) -> list[str]:
    return [name for name, (_, its) in METHODS.items() if its == group and results.has(name)]


def _rows(results: Results, names: Sequence[str], *, paired: bool = True) -> list[str]:
    """A row for each measured method, with differences from black-box KD where it is paired."""
    paired = paired and results.has(BLACK_BOX)
    rows = []
    for name in filter(results.has, names):
        cells = [label_of(name)]
        cells += [str(results.mean(name, checkpoint, metric)) for metric, checkpoint in _COLUMNS]
        cells.append(str(results.mean(name, BEST, AGREEMENT)))
        if paired:
            cells += [
                "" if name == BLACK_BOX else results.difference(name, BLACK_BOX, c, m).signed()
                for m, c in _COLUMNS
            ]
        rows.append(cells)
    return markdown(["", *_HEADS, "agreement, best", *(_CHANGES if paired else [])], rows)


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
        means = [str(results.mean(name, c, metric)) for metric, c in _COLUMNS]
        changes = [results.difference(name, base, c, m).with_interval() for m, c in _COLUMNS]
        rows.append([label_of(name), *means, *changes])
    note = "Δ are paired by seed, against the same without the change, with intervals of 95 %."
    return [note, "", *markdown(["", *_HEADS, *_CHANGES], rows)] if rows else []


def _times(results: Results) -> list[str]:
    rows = []
    for name in results.methods():
        of_round = f"{name}, a round"
        for metric, label in (
            ("seconds_a_round", of_round),
            ("seconds", f"student, {label_of(name)}"),
        ):
            if LAST in results.checkpoints(name, metric):
                rows.append([label, f"{results.mean(name, LAST, metric).mean:.2f}"])
    note = "Wall-clock seconds a seed; of a round without the first, of a student all its steps."
    return [note, "", *markdown(["", "seconds"], rows)] if rows else []


def _verdicts(results: Results) -> list[str]:
    rows = []
    for claim, metric, found in verdicts(results):
        differences = [
            results.difference(claim.better, claim.worse, checkpoint, metric).with_interval()
            for checkpoint in CHECKPOINTS
        ]
        rows.append([claim.text, claim.source, metric, *differences, found])
    return markdown(["claim", "source", "metric", "Δ best", "Δ last", "verdict"], rows)
