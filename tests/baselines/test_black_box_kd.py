"""Black-box KD is the NLL of the teacher's texts; it does not depend on a proxy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.artifacts import MANIFEST, read_json
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from tests.baselines.runs import (
    ONE_STEP,
    answer_logps,
    check_stopped_run_equals_unbroken,
    first_step,
    mean_nll,
    method_recipe,
    untrained_student,
)


def test_its_loss_is_the_nll_of_the_teachers_answers(tiny_files: Path, tmp_path: Path):
    config = method_recipe(tiny_files, tmp_path, "black_box_kd", ONE_STEP)
    line = first_step(config)
    corpus = open_corpus(config.folder / "corpus")
    rows = [row for name in ("warmup", "align", "distill") for row in corpus.split(name)]
    nll = mean_nll(answer_logps(untrained_student(config), rows), rows)
    assert line["loss"] == pytest.approx(nll, rel=1e-4)
    assert {path.name for path in config.folder.iterdir() if path.is_dir()} == {
        "corpus",
        "student",
        "export",
    }


def test_a_proxy_of_noise_changes_no_byte_of_the_student(tiny_files: Path, tmp_path: Path):
    """The proxy's weights are random bytes: reading them would fail or change the student."""
    first = method_recipe(tiny_files, tmp_path / "first", "black_box_kd")
    noise = shutil.copytree(tiny_files / "proxy", tmp_path / "noise")
    weights = noise / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(np.random.default_rng(0).bytes(size))
    change = {"proxy": {"path": str(noise)}, "tokenizer": str(tiny_files / "proxy")}
    second = method_recipe(tiny_files, tmp_path / "second", "black_box_kd", change)
    distill.main(first)
    distill.main(second)
    manifests = [read_json(c.folder / "student" / MANIFEST) for c in (first, second)]
    assert manifests[0]["content"] == manifests[1]["content"]
    exported = [
        (c.folder / "export" / "student" / "model.safetensors").read_bytes()
        for c in (first, second)
    ]
    assert exported[0] == exported[1]


@pytest.mark.slow  # the quick tests stop Proxy-KD, which resumes in the same loop
def test_a_stopped_run_equals_an_unbroken_one(tiny_files, tmp_path, monkeypatch):
    config = method_recipe(tiny_files, tmp_path / "whole", "black_box_kd")
    check_stopped_run_equals_unbroken(config, tmp_path / "stopped", monkeypatch, 4)


def test_a_weight_of_the_kl_contradicts_it(tiny_files: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"distill\.alpha: method\.name black_box_kd requires"):
        method_recipe(tiny_files, tmp_path, "black_box_kd", {"distill": {"alpha": 10}})
