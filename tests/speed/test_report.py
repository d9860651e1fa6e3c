"""Records, bars and the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speed import report
from benchmarks.speed.cases import Comparison, all_cases
from benchmarks.speed.coordinator import Timed

FIELDS = {"name", "ours", "peer", "ratio", "spread", "bar", "ok"}


def timed(wall: float, cpu: float, peak: int = 100, **extra: float) -> Timed:
    return Timed({"extra": extra, "units": 1.0}, [wall] * 3, [cpu] * 3, peak)


@pytest.mark.parametrize(
    ("options", "ratio", "ok"),
    [
        ({"bar": 1.0}, 1.5, True),
        ({"bar": 1.6}, 1.5, False),
        ({"bar": 1.0, "measure": "cpu"}, 0.5, False),
        ({"bar": 0.7, "lower_is_better": True}, 1 / 1.5, True),
        ({"bar": 1.1, "measure": "peak", "lower_is_better": True}, 1.2, False),
        ({"bar": 0.2, "lower_is_better": True, "times_floor": True}, 1 / 1.5, False),
        ({}, 1.5, None),
    ],
)
def test_a_ratio_is_judged_in_its_direction(options: dict, ratio: float, ok: bool | None) -> None:
    both = {"a": timed(2.0, 4.0, 120, floor=2.9, papers_ratio=5.1), "b": timed(3.0, 2.0)}
    record = report.record_of(Comparison("x", "a", "b", **options), both)
    assert record.keys() >= FIELDS
    assert record["ratio"] == pytest.approx(ratio)
    assert record["ok"] is ok


def test_the_bar_of_a_round_is_a_multiple_of_its_floor() -> None:
    both = {"a": timed(8.0, 8.0, floor=2.5, papers_ratio=5.1), "b": timed(2.5, 2.5)}
    options = {"bar": 1.4, "lower_is_better": True, "times_floor": True}
    record = report.record_of(Comparison("round", "a", "b", **options), both)
    assert record["bar"] == pytest.approx(3.5)
    assert record["ok"] is True
    assert "the paper 5.1" in report.line(record)


def test_what_is_written(tmp_path: Path) -> None:
    records = [
        report.record_of(Comparison("x", "a", "b", bar=1.0), {"a": timed(1, 1), "b": timed(2, 2)}),
        report.skipped(Comparison("y", "a", "b", bar=1.0), "no such file"),
    ]
    records[0]["settings"]["peer"] = [{"name": "head=fused", "seconds": 0.5, "chosen": True}]
    report.write(tmp_path, records, {"cores": 2})
    read = json.loads((tmp_path / "speed.json").read_text())
    assert [record["name"] for record in read] == ["x", "y"]
    assert all(record.keys() >= FIELDS for record in read)
    text = (tmp_path / "speed.md").read_text()
    assert "| x | 1 s | 2 s | 2.00 |" in text
    assert "no such file" in text
    assert "x, peer: head=fused: 0.5 s (taken)" in text


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("quick", [False, True])
def test_cases_name_their_entries(backend: str, quick: bool) -> None:
    cases = all_cases(backend, quick)
    names = [case.name for case in cases]
    records = [one.name for case in cases for one in case.comparisons]
    assert len(set(names)) == len(names) and len(set(records)) == len(records)
    for case in cases:
        labels = {entry.label for entry in case.entries}
        assert labels >= set(case.same)
        for one in case.comparisons if case.entries else ():
            assert {one.ours, one.against} <= labels
