"""Turns, refusals and failures are tested with workers that measure nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.speed import coordinator, report, run_case
from benchmarks.speed.cases import Case, Comparison, Entry
from benchmarks.speed.coordinator import Worker, WorkerFailed
from benchmarks.speed.run_case import Bench

FAKE = Path(__file__).with_name("fake_worker.py")


def fake(folder: Path, name: str, seconds: str = "1.0", loss: float = 2.0) -> Worker:
    command = [sys.executable, str(FAKE), name, seconds, str(loss), str(folder / "turns")]
    return Worker(command, folder / f"{name}.log")


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[dict[str, Worker]]:
    made = {"ours": fake(tmp_path, "A", "1.0"), "torch": fake(tmp_path, "B", "1.5")}
    with contextlib.ExitStack() as stack:
        for worker in made.values():
            stack.callback(worker.close)
        yield made


def test_workers_take_turns_and_medians_leave_outliers_out(
    workers: dict[str, Worker], tmp_path: Path
) -> None:
    found = coordinator.prepare(workers, {label: {} for label in workers})
    timed = {label: one for label, one in found.items() if not isinstance(one, str)}
    assert coordinator.take_turns(workers, timed, 3) == {}
    assert (tmp_path / "turns").read_text() == "ABABAB"
    record = report.record_of(Comparison("step", "ours", "torch", bar=1.2), timed)
    assert (record["ours"], record["peer"], record["ratio"]) == (1.0, 1.5, 1.5)
    assert record["spread"] == [1.5, 1.5]
    assert record["ok"] is True
    assert record["peak_bytes"] == {"ours": 1000, "peer": 1000}
    assert record["units_a_second"] == {"ours": 10.0, "peer": pytest.approx(10 / 1.5)}


@pytest.mark.parametrize(
    ("seconds", "said"), [("dies", "ended with code 3"), ("fails", "ValueError: no such work")]
)
def test_a_worker_that_goes_wrong_says_so(tmp_path: Path, seconds: str, said: str) -> None:
    worker = fake(tmp_path, "A", seconds)
    with contextlib.closing(worker), pytest.raises(WorkerFailed, match=said):
        worker.ask({"do": "prepare", "task": {}}, 20)


def test_silence_is_a_failure(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    worker = Worker(command, tmp_path / "log")
    with contextlib.closing(worker), pytest.raises(WorkerFailed, match="no answer within 0 s"):
        worker.ask({"do": "prepare", "task": {}}, 0.2)


def bench_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **seconds_and_loss: tuple) -> Bench:
    """A bench whose workers are fakes."""
    bench = Bench(tmp_path / "work", dict.fromkeys(seconds_and_loss, sys.executable))
    monkeypatch.setattr(
        Bench, "start", lambda self, tool, log: fake(tmp_path, tool, *seconds_and_loss[tool])
    )
    monkeypatch.setattr(run_case, "model_folder", lambda work, task: work)
    (tmp_path / "work" / "adapter").mkdir(parents=True)
    return bench


CASE = Case(
    name="step",
    entries=(
        Entry("ours", "ours", {"work": "sft", "shape": "tiny"}),
        Entry("torch", "torch", {"work": "sft", "shape": "tiny"}),
    ),
    comparisons=(Comparison("step/torch", "ours", "torch", bar=1.0),),
    repetitions=2,
    same=("ours", "torch"),
)


def test_results_that_differ_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, monkeypatch, ours=("1.0", 2.0), torch=("1.0", 2.1))
    (record,) = run_case.run_case(bench, CASE)
    assert record["ok"] is None and record["ratio"] is None
    assert "results differ: loss: ours 2, torch 2.1" in record["reason"]
    assert not (tmp_path / "turns").exists()


def test_a_bar_that_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, monkeypatch, ours=("1.0", 2.0), torch=("0.5", 2.0))
    (record,) = run_case.run_case(bench, CASE)
    assert record["ok"] is False and record["ratio"] == 0.5


def test_seconds_are_those_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(tmp_path, monkeypatch, ours=("1.0", 2.0), torch=("0.5", 2.0))
    (record,) = run_case.run_case(bench, dataclasses.replace(CASE, repetitions=3, steps=4))
    assert (record["ours"], record["peer"], record["ratio"]) == (0.25, 0.125, 0.5)
    assert record["turns"]["ours"]["wall"] == [2.5, 0.25, 0.25]


def test_a_missing_tool_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(tmp_path, monkeypatch, ours=("1.0", 2.0))
    bench.interpreters = {**bench.interpreters, "torch": str(tmp_path / "nothing" / "python")}
    (record,) = run_case.run_case(bench, CASE)
    assert record["ok"] is None
    assert "pip install -r requirements-peers.txt" in record["reason"]


def test_a_case_that_waits_for_something_says_for_what(tmp_path: Path) -> None:
    case = Case("later", (), (Comparison("later", "a", "b", bar=1.3),), skip="not there yet")
    (record,) = run_case.run_case(Bench(tmp_path, {}), case)
    assert (record["ok"], record["reason"], record["bar"]) == (None, "not there yet", 1.3)
