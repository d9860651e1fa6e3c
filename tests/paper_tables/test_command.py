"""The command with few rows and steps, and with --quick."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.miniature import pretrain
from benchmarks.paper_tables import __main__ as command
from benchmarks.paper_tables import sweeps
from benchmarks.paper_tables.methods import METHODS
from benchmarks.paper_tables.settings import Sizes
from benchmarks.paper_tables.study import Study
from tests.conftest import COMPILES_AS_USERS_DO

FEW = Sizes(
    num_corpus=160,
    num_test=24,
    num_fresh=30,
    steps_share=0.002,
    overrides=(
        "align.warmup_max_steps=2",
        "align.num_rounds=2",
        "align.round_max_steps=2",
        "align.stop.every=2",
        "align.batch_size=16",
        "distill.max_steps=2",
        "distill.stop.every=2",
        "distill.batch_size=16",
    ),
)


@pytest.mark.slow  # it compiles for a minute
def test_few_steps_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(pretrain, "STEPS_A_CALL", 2)
    arguments = ["--quick", "--seeds", "2", "--out", str(tmp_path)]
    assert command.main(arguments, FEW) == 0
    records = json.loads((tmp_path / "tables.json").read_text())
    keys = {"regime", "preset", "method", "checkpoint", "seed", "metric", "value"}
    assert all(set(record) == keys for record in records)
    assert {record["seed"] for record in records} == {0, 1}
    measured = {record["method"] for record in records}
    assert {"teacher", "student", "proxy/nll_preference"} <= measured
    assert set(METHODS) & measured == set(METHODS) - set(command.QUICK_WITHOUT)
    assert all(np.isfinite(record["value"]) for record in records)
    text = (tmp_path / "tables.md").read_text()
    assert "Table 1" in text and "too few seeds" in text
    assert capsys.readouterr().out.endswith(text + "\n")
    assert (tmp_path / "fig_5_agreement_fmt_paper.svg").exists()

    # A second call uses the records on disk and gives the same tables.
    monkeypatch.setattr(Study, "proxy_records", None)
    monkeypatch.setattr(Study, "student_records", None)
    assert command.main(arguments, FEW) == 0
    assert json.loads((tmp_path / "tables.json").read_text()) == records
    assert command.main([*arguments, "--first-seed", "5"], FEW) == 2
    assert "Choose another --out" in capsys.readouterr().err


def test_unknown_method_is_refused(tmp_path: Path, capsys) -> None:
    assert command.main(["--methods", "proxykd", "--out", str(tmp_path / "new")]) == 2
    assert "'proxykd' is none of" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_unknown_change_is_refused(tmp_path: Path, capsys) -> None:
    assert command.main(["--sweep", "alpha 2", "--out", str(tmp_path / "new")]) == 2
    assert "'alpha 2' is none of alpha 1; alpha 3" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_students_that_a_change_trains_are_trained_without_it_too() -> None:
    """The table of changes shows their difference."""
    assert sweeps.students(["four times the alignment", "alpha 1"], ["recommended"]) == [
        "proxy_kd",
        "without_preference",
    ]
    assert sweeps.students(["1,600 steps"], ["recommended"])[-1] == "proxy_kd_mix"
    assert sweeps.students([], ["paper"]) == []


@pytest.mark.slow
def test_quick_form(tmp_path: Path) -> None:
    """One seed, and the students of the effects that every seed of every run has shown."""
    program = [sys.executable, "-m", "benchmarks.paper_tables", "--quick", "--out", str(tmp_path)]
    students = {"proxy_kd", "black_box_kd", "without_alignment_raw"}
    program += ["--seeds", "1", "--methods", ",".join(students)]
    # These programs are optimised, unlike those of tests that compute little.
    subprocess.run(program, check=True, env=os.environ | COMPILES_AS_USERS_DO)
    records = json.loads((tmp_path / "tables.json").read_text())
    values = {(r["method"], r["checkpoint"], r["metric"]): r["value"] for r in records}
    assert set(METHODS) & {method for method, *_ in values} == students

    def best(method: str, metric: str) -> float:
        return values[method, "best", metric]

    assert best("proxy/nll", "kl") < 0.7 * best("proxy/raw", "kl")
    assert best("proxy/nll", "agreement") > best("proxy/raw", "agreement")
    assert best("proxy_kd", "accuracy") > best("black_box_kd", "accuracy")
    assert best("proxy_kd", "kl") < best("without_alignment_raw", "kl")
    assert best("teacher", "kl") == 0.0
