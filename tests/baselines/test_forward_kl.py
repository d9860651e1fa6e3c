"""Forward-KL white-box KD: the scorer's own answers and its distribution on them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.models.hf_weights import save_model
from proxykd_jax.models.params import init_params
from proxykd_jax.parallel.mesh import make_mesh
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
from tests.tiny_run import PROXY, files_of

# All ids are stored, so the KL covers the whole vocabulary.
WHOLE: dict[str, Any] = {"score": {"top_k": 46}}


def answered(config: Config) -> AnsweredSplit:
    corpus = open_corpus(config.folder / "corpus")
    return AnsweredSplit(corpus.split("distill"), SampleStore(config.folder / "samples" / "scorer"))


@pytest.mark.parametrize("scorer", ["unaligned", "aligned"])
def test_its_loss_is_nll_and_kl_on_the_scorers_own_answers(
    tiny_files: Path, tmp_path: Path, scorer: str
):
    method = {"name": "forward_kl", "scorer": scorer, "kl_weight": 0.7, "nll_weight": 0.2}
    config = method_recipe(tiny_files, tmp_path, method, ONE_STEP, WHOLE)
    line = first_step(config)
    rows = answered(config).read(range(len(answered(config))))
    corpus = open_corpus(config.folder / "corpus")
    prompts = {row.prompt.tobytes() for row in corpus.split("distill")}
    assert {row.prompt.tobytes() for row in rows} <= prompts
    assert len(rows) > 0.8 * len(corpus.split("distill"))
    proxy = load_aligned_proxy(config, make_mesh(config.mesh))
    p, q = answer_logps(proxy, rows), answer_logps(untrained_student(config), rows)
    assert line["nll"] == pytest.approx(mean_nll(q, rows), rel=1e-4)
    assert line["kl"] == pytest.approx(mean_kl(p, q), rel=1e-3)
    assert line["loss"] == pytest.approx(0.7 * line["kl"] + 0.2 * line["nll"], rel=1e-5)
    # The weights of eq. 9 are not used.
    assert line["weighted_kl"] == line["kl"]
    assert ("round_01" in {path.name for path in (config.folder / "samples").iterdir()}) == (
        scorer == "aligned"
    )


def test_it_hears_the_scorer(tiny_files: Path, tmp_path: Path):
    """Unlike in black-box KD, another scorer changes the student, and other texts of the teacher do
    not."""
    other = shutil.copytree(tiny_files / "proxy", tmp_path / "other")
    save_model(other, PROXY, init_params(jax.random.key(9), PROXY), source=other, overwrite=True)
    config = method_recipe(tiny_files, tmp_path / "a", "forward_kl", ONE_STEP)
    noise = method_recipe(
        tiny_files, tmp_path / "b", "forward_kl", ONE_STEP, {"proxy": {"path": str(other)}}
    )
    assert abs(first_step(config)["loss"] / first_step(noise)["loss"] - 1) > 1e-3


def test_the_teachers_answers_are_not_looked_at(tiny_files: Path, tmp_path: Path):
    config = method_recipe(tiny_files, tmp_path, "forward_kl")
    distill.main(config)
    corpus = open_corpus(config.folder / "corpus")
    teachers = {row.row_id for row in corpus.split("distill")}
    learnt = set(answered(config).row_ids)
    # The tiny random proxy never writes what the teacher wrote.
    assert not teachers & learnt
    labels = files_of(config.folder / "soft_labels")
    assert {path.split("/")[0] for path in labels} == {"manifest.json", "scorer"}


@pytest.mark.slow  # the quick tests stop Proxy-KD, which resumes in the same loop
def test_a_stopped_run_equals_an_unbroken_one(tiny_files, tmp_path, monkeypatch):
    config = method_recipe(tiny_files, tmp_path / "whole", "forward_kl")
    check_stopped_run_equals_unbroken(config, tmp_path / "stopped", monkeypatch, 4)


def test_answers_that_are_there_are_not_drawn_again(tiny_files: Path, tmp_path: Path):
    config = method_recipe(tiny_files, tmp_path, "forward_kl")
    distill.main(config)
    before = files_of(config.folder / "samples", times=True)
    shutil.rmtree(config.folder / "student")
    shutil.rmtree(config.folder / "soft_labels")
    distill.main(config)
    assert files_of(config.folder / "samples", times=True) == before
    assert np.all(SampleStore(config.folder / "samples" / "scorer").rows >= 0)


@pytest.mark.parametrize(
    "method, change, said",
    [
        (
            "forward_kl",
            {"align": {"alignment": "nll"}},
            "align.alignment: method.name forward_kl requires",
        ),
        (
            "forward_kl",
            {"distill": {"data": "all"}},
            "distill.data: method.name forward_kl requires",
        ),
        (
            {"name": "forward_kl", "scorer": "aligned"},
            {"align": {"alignment": "none"}},
            "method.scorer is aligned, but align.alignment is none",
        ),
        ({"name": "forward_kl", "kl_weight": -1}, {}, "method.kl_weight: should be greater"),
        ({"name": "forward_kl", "kl_wieght": 1}, {}, "did you mean 'kl_weight'"),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        method_recipe(tiny_files, tmp_path, method, change)
