"""TAKD: an assistant that is trained without sampling, and its distribution at temperature T."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax import distill
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training import draw_answers
from proxykd_jax.training.restore import load_aligned_proxy
from tests.baselines.runs import (
    ONE_STEP,
    answer_logps,
    check_stopped_run_equals_unbroken,
    first_step,
    mean_kl,
    mean_nll,
    method_recipe,
    untrained_student,
)
from tests.tiny_run import log_lines

WHOLE: dict[str, Any] = {"score": {"top_k": 46}}
SPLITS = ("warmup", "align", "distill")


@pytest.mark.parametrize("assistant", ["finetuned", "raw"])
def test_its_loss_is_nll_and_the_rescaled_kl_to_the_assistant(
    tiny_files: Path, tmp_path: Path, assistant: str
):
    method = {"name": "takd", "assistant": assistant, "lam": 0.7, "temperature": 2.0}
    config = method_recipe(tiny_files, tmp_path, method, ONE_STEP, WHOLE)
    line = first_step(config)
    corpus = open_corpus(config.folder / "corpus")
    rows = [row for name in SPLITS for row in corpus.split(name)]
    p = answer_logps(load_aligned_proxy(config, make_mesh(config.mesh)), rows)
    q = answer_logps(untrained_student(config), rows)
    kl, nll = 4 * mean_kl(p, q, 2.0), mean_nll(q, rows)
    assert line["kl"] == pytest.approx(kl, rel=1e-3)
    assert line["loss"] == pytest.approx(0.3 * nll + 0.7 * kl, rel=1e-3)
    phases = [line["phase"] for line in log_lines(config, "align") if "loss" in line]
    rounds = {"warmup", "round_01", "round_02"}
    assert set(phases) == (rounds if assistant == "finetuned" else set())


def test_the_assistant_never_samples_and_prefers_nothing(tiny_files, tmp_path, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("the assistant samples")

    monkeypatch.setattr(draw_answers, "sample_round", refuse)
    config = method_recipe(tiny_files, tmp_path, "takd")
    distill.main(config)
    assert not (config.folder / "samples").exists()
    assert not [line for line in log_lines(config, "align") if "preference" in line]


@pytest.mark.slow  # the quick tests stop Proxy-KD, which resumes in the same loop
def test_a_stopped_run_equals_an_unbroken_one(tiny_files, tmp_path, monkeypatch):
    method = {"name": "takd", "temperature": 2.0}
    config = method_recipe(tiny_files, tmp_path / "whole", method)
    check_stopped_run_equals_unbroken(config, tmp_path / "stopped", monkeypatch, 4)


@pytest.mark.parametrize(
    "method, change, said",
    [
        (
            "takd",
            {"align": {"alignment": "nll_preference"}},
            "align.alignment: method.name takd requires",
        ),
        ({"name": "takd", "lam": 0.4}, {"distill": {"alpha": 0.5}}, "takd requires 0.4"),
        ("takd", {"score": {"temperature": 3}}, "score.temperature: method.name takd requires"),
        ({"name": "takd", "lam": 1.5}, {}, "method.lam: should be less than or equal to 1"),
        ({"name": "takd", "assistant": "big"}, {}, "method.assistant: must be 'finetuned'"),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        method_recipe(tiny_files, tmp_path, method, change)
