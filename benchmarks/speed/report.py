"""Makes the records of the measurements, ``speed.json`` and ``speed.md``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed.cases import Comparison
from benchmarks.speed.coordinator import Timed

Record = dict[str, Any]


def skipped(comparison: Comparison, reason: str) -> Record:
    """The record of a comparison that was not measured, with the reason."""
    record = _empty(comparison)
    record["reason"] = reason
    return record


def _empty(comparison: Comparison) -> Record:
    return {
        "name": comparison.name,
        "ours": None,
        "peer": None,
        "ratio": None,
        "spread": None,
        "bar": comparison.bar,
        "ok": None,
        "direction": "<=" if comparison.lower_is_better else ">=",
        "measure": comparison.measure,
        "reason": "",
    }


def record_of(comparison: Comparison, timed: Mapping[str, Timed]) -> Record:
    """The record of a comparison: medians, their ratio, quartiles over turns, and the verdict."""
    ours, against = timed[comparison.ours], timed[comparison.against]
    record = _empty(comparison)
    lower = comparison.lower_is_better
    ratios = {
        measure: _ratio(values(ours, measure), values(against, measure), lower)
        for measure in ("wall", "cpu", "peak")
    }
    sides = {"ours": ours, "peer": against}
    mine, other = (values(one, comparison.measure) for one in (ours, against))
    each = [_ratio([a], [b], lower) for a, b in zip(mine, other, strict=True) if a > 0 and b > 0]
    record |= {
        "ours": statistics.median(mine),
        "peer": statistics.median(other),
        "ratio": ratios[comparison.measure],
        "spread": _quartiles(each),
        "peer_name": comparison.against,
        "wall_ratio": ratios["wall"],
        "cpu_ratio": ratios["cpu"],
        "memory_ratio": ratios["peak"],
        "turns": {name: {"wall": one.wall, "cpu": one.cpu} for name, one in sides.items()},
        "units_a_second": {
            name: one.described.get("units", 0.0) / statistics.median(one.wall)
            for name, one in sides.items()
        },
        "peak_bytes": {"ours": ours.peak_bytes, "peer": against.peak_bytes},
        "settings": {name: one.described.get("settings", []) for name, one in sides.items()},
    }
    extra = ours.described.get("extra", {})
    if comparison.times_floor and comparison.bar is not None:
        record["bar"] = comparison.bar * extra["floor"]
        record |= {name: extra[name] for name in ("floor", "papers_ratio")}
    record["ok"] = judge(record)
    if record["bar"] is None:
        record["reason"] = "no bar: a curve"
    return record


def judge(record: Record) -> bool | None:
    """Whether the ratio meets the bar; None where either is missing."""
    if record["bar"] is None or record["ratio"] is None:
        return None
    if record["direction"] == ">=":
        return bool(record["ratio"] >= record["bar"])
    return bool(record["ratio"] <= record["bar"])


def values(timed: Timed, measure: str) -> list[float]:
    """The compared value of each turn."""
    if measure == "peak":
        return [float(timed.peak_bytes)]
    return timed.cpu if measure == "cpu" else timed.wall


def _ratio(ours: Sequence[float], against: Sequence[float], lower_is_better: bool) -> float:
    mine, other = statistics.median(ours), statistics.median(against)
    above, below = (mine, other) if lower_is_better else (other, mine)
    return above / below if below else 0.0


def _quartiles(ratios: list[float]) -> list[float] | None:
    if len(ratios) < 2:
        return None
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return [low, high]


def write(folder: Path, records: Sequence[Record], machine: Mapping[str, Any]) -> None:
    """Writes ``speed.json``, the list of records, ``machine.json`` and ``speed.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "speed.json").write_text(json.dumps(list(records), indent=2) + "\n")
    (folder / "machine.json").write_text(json.dumps(dict(machine), indent=2) + "\n")
    (folder / "speed.md").write_text(table(records, machine))


def table(records: Sequence[Record], machine: Mapping[str, Any]) -> str:
    """The Markdown of all records, and of the settings that were tried."""
    told = ", ".join(f"{name} {value}" for name, value in machine.items())
    lines = ["# Speed", "", told, ""]
    lines += [
        "| case | ours | peer | ratio | quartiles | CPU ratio | bar | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        lines.append(line(record))
    tried = ["", "## Settings that were tried", ""]
    for record in records:
        for side, settings in (record.get("settings") or {}).items():
            for one in settings:
                tried.append(f"- {record['name']}, {side}: {_setting(one)}")
    return "\n".join([*lines, *tried]) + "\n"


def line(record: Record) -> str:
    """A record as a row of the table."""
    bar = "-" if record["bar"] is None else f"{record['direction']} {record['bar']:.2f}"
    if record["ratio"] is None:
        return f"| {record['name']} | | | | | | {bar} | {record['reason']} |"
    spread = record["spread"]
    quartiles = "" if spread is None else f"{spread[0]:.2f} to {spread[1]:.2f}"
    cpu = record.get("cpu_ratio")
    verdict = {True: "ok", False: "**missed**", None: ""}[record["ok"]]
    if "papers_ratio" in record:
        verdict += f" (floor {record['floor']:.2f}, the paper {record['papers_ratio']})"
    if "flop_utilisation" in record:
        verdict += f" ({record['flop_utilisation']:.2f} of the peak)"
    measured = [_quantity(record[side], record["measure"]) for side in ("ours", "peer")]
    return (
        f"| {record['name']} | {measured[0]} | {measured[1]} | {record['ratio']:.2f} "
        f"| {quartiles} | {'' if cpu is None else f'{cpu:.2f}'} | {bar} | {verdict} |"
    )


def _quantity(value: float | None, measure: str) -> str:
    if value is None:
        return ""
    if measure == "peak":
        return f"{value / 2**20:.0f} MiB"
    return f"{value:.4g} s" + (" CPU" if measure == "cpu" else "")


def _setting(one: Mapping[str, Any]) -> str:
    text = str(one["name"])
    if "error" in one:
        return f"{text}: {one['error']}"
    if one.get("seconds") is not None:
        text += f": {one['seconds']:.4g} s"
    return text + (" (taken)" if one.get("chosen") else "")
