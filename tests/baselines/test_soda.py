"""SODA: answers of the untrained student; DPO starts from the warmed-up one, the reference."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import KEPT, SampleStore
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_student
from tests.baselines.runs import (
    answer_logps,
    arrays_of,
    changed,
    check_stopped_run_equals_unbroken,
    method_recipe,
)
from tests.tiny_run import log_lines

SODA: dict[str, Any] = {"name": "soda", "beta": 0.5, "warmup_epochs": 1}
SPLITS = ("warmup", "align", "distill")
LN_2 = 0.6931471805599453


@pytest.fixture(scope="module")
def finished(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = method_recipe(tiny_files, tmp_path_factory.mktemp("soda"), SODA)
    distill.main(config)
    return config


def store_of(config: Config) -> SampleStore:
    folder = config.folder
    return SampleStore(folder / "samples" / "base_student", folder / "student" / "reference")


def pairs_of(config: Config) -> tuple[list[TokenRow], list[TokenRow], np.ndarray]:
    """Returns the teacher's rows, the kept y-hat, and which rows have one."""
    corpus, store = open_corpus(config.folder / "corpus"), store_of(config)
    chosen = [row for name in SPLITS for row in corpus.split(name)]
    drawn = store.read(range(len(store)))
    kept = np.array([sample.drop == KEPT for sample in drawn])
    rejected = [
        TokenRow(np.concatenate([row.prompt, sample.tokens]), row.prompt_length, row.row_id)
        for row, sample in zip(chosen, drawn, strict=True)
    ]
    return chosen, rejected, kept


def summed(logps: list[np.ndarray], rows: list[TokenRow]) -> np.ndarray:
    return np.array(
        [q[np.arange(len(q)), row.answer].sum() for q, row in zip(logps, rows, strict=True)]
    )


def step_after(config: Config, phase: str) -> int:
    from proxykd_jax.artifacts import MANIFEST, read_json

    results = read_json(config.folder / "student" / MANIFEST)["results"]
    return next(result["step"] for result in results if result["phase"] == phase)


def test_the_other_answers_are_the_untrained_students(finished: Config):
    """The log-likelihoods recorded while sampling are those of the student at step 0, not those of
    the warmed-up one."""
    mesh = make_mesh(finished.mesh)
    _, rejected, kept = pairs_of(finished)
    rejected = [row for row, usable in zip(rejected, kept, strict=True) if usable]
    noted = np.array([s.loglik for s in store_of(finished).read(np.flatnonzero(kept))])
    base = summed(answer_logps(load_student(finished, mesh, 0), rejected), rejected)
    warm = load_student(finished, mesh, step_after(finished, "warmup"))
    np.testing.assert_allclose(noted, base, atol=1e-3)
    assert np.abs(noted - summed(answer_logps(warm, rejected), rejected)).mean() > 0.1


def test_the_other_answers_do_not_depend_on_the_warm_up(finished: Config, tmp_path: Path):
    """They do not depend on beta or the optimizer either; the reference does."""
    change = {
        "method": {**SODA, "warmup_max_steps": 1, "beta": 2.0},
        "distill": {"optimizer": {"learning_rate": 3e-3}},
        "runs_dir": str(tmp_path),
    }
    other = changed(finished, change)
    distill.main(other)
    answers = [arrays_of(c.folder / "samples") for c in (finished, other)]
    assert answers[0] and answers[0] == answers[1]
    references = [arrays_of(c.folder / "student" / "reference") for c in (finished, other)]
    assert references[0] != references[1]


def test_a_new_warm_up_draws_nothing_anew(finished: Config, tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / finished.name)
    other = changed(finished, {"runs_dir": str(tmp_path), "method": {"warmup_max_steps": 1}})
    with pytest.raises(UserError, match="method"):
        distill.main(other)
    shutil.rmtree(other.folder / "student")
    before = arrays_of(other.folder / "samples")
    distill.main(other)
    assert arrays_of(other.folder / "samples") == before


def test_the_reference_is_the_warmed_up_student_and_stays(finished: Config):
    """After DPO the stored log-probs still equal those of the checkpoint before it."""
    chosen, rejected, kept = pairs_of(finished)
    step = step_after(finished, "warmup")
    assert step < step_after(finished, "dpo")
    mesh = make_mesh(finished.mesh)
    warm, last = load_student(finished, mesh, step), load_student(finished, mesh, "last")
    of_chosen, of_rejected = store_of(finished).references()
    np.testing.assert_allclose(of_chosen, summed(answer_logps(warm, chosen), chosen), atol=1e-3)
    expected = summed(answer_logps(warm, rejected), rejected)
    np.testing.assert_allclose(of_rejected[kept], expected[kept], atol=1e-3)
    moved = summed(answer_logps(last, chosen), chosen)
    assert np.abs(moved - of_chosen).mean() > 0.1


def test_the_first_loss_is_ln_2_and_then_it_falls(finished: Config):
    lines = [line for line in log_lines(finished, "distill") if "preference" in line]
    assert {line["phase"] for line in lines} == {"dpo"}
    assert lines[0]["loss"] == lines[0]["preference"] == pytest.approx(LN_2, abs=1e-5)
    assert lines[-1]["preference"] < LN_2 - 0.01
    assert lines[-1]["reward_margin"] > 0.01


def test_another_reference_is_noticed_at_the_first_step(finished: Config, tmp_path, monkeypatch):
    """Here the base student is the reference."""
    from proxykd_jax.baselines import soda

    real = soda.store_references

    def of_the_base(store: Any, plan: Any, collate: Any, model: Any, **how: Any):
        real(store, plan, collate, load_student(finished, make_mesh(finished.mesh), 0), **how)

    monkeypatch.setattr(soda, "store_references", of_the_base)
    with pytest.raises(UserError, match="must be ln 2"):
        distill.main(changed(finished, {"runs_dir": str(tmp_path)}))


@pytest.mark.parametrize("at", [3, 10], ids=["in the warm-up", "in DPO"])
def test_a_stopped_run_equals_an_unbroken_one(finished: Config, tmp_path, monkeypatch, at):
    assert 3 < step_after(finished, "warmup") < 10 < step_after(finished, "dpo")
    check_stopped_run_equals_unbroken(finished, tmp_path, monkeypatch, at)


def test_lost_references_are_not_computed_from_a_student_that_moved(
    finished: Config, tmp_path, monkeypatch
):
    from proxykd_jax.errors import Stopped
    from proxykd_jax.training import loop

    config = changed(finished, {"runs_dir": str(tmp_path)})
    calls = iter(range(step_after(finished, "warmup") + 2))
    monkeypatch.setattr(loop, "stop_wanted", lambda: next(calls, None) is None)
    with pytest.raises(Stopped):
        distill.main(config)
    shutil.rmtree(config.folder / "student" / "reference")
    monkeypatch.undo()
    with pytest.raises(UserError, match="the student was trained further"):
        distill.main(config)


@pytest.mark.parametrize(
    "method, change, said",
    [
        ("soda", {}, "method.beta: required: strength of the preference"),
        ({"name": "soda", "beta": 0}, {}, "method.beta: should be greater than 0"),
        (SODA, {"distill": {"alpha": 1.0}}, "distill.alpha: method.name soda requires"),
        (
            SODA,
            {"align": {"sampling": {"server": {"url": "http://x:1", "api": "vllm"}}}},
            "align.sampling.server: method.name soda requires null",
        ),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        method_recipe(tiny_files, tmp_path, method, change)
