"""Finished stages: which of their states is loaded, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from proxykd_jax.artifacts import MANIFEST, read_json, read_manifest, write_manifest
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.evaluation.measures import validation_figures
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_aligned_proxy, load_student
from tests.tiny_run import changed, copy_run, log_lines, unfinish

LOADERS = {"proxy": load_aligned_proxy, "student": load_student}
STAGES = {"proxy": "align", "student": "distill"}


def kept_steps(config: Config, role: str) -> list[int]:
    manifest = read_json(config.folder / role / MANIFEST)
    return sorted({*manifest["kept_steps"], manifest["best_step"], manifest["last_step"]})


@pytest.mark.parametrize("role", LOADERS)
def test_each_kept_step_is_the_model_that_was_validated_there(finished_run, role):
    """Its NLL, measured again, is the logged one of that step."""
    mesh = make_mesh(finished_run.mesh)
    rows = open_corpus(finished_run.folder / "corpus").split("validation")
    measure = validation_figures(16, mesh)
    logged = {
        line["step"]: line["validation/nll"]
        for line in log_lines(finished_run, STAGES[role])
        if "validation/nll" in line
    }
    steps = kept_steps(finished_run, role)
    assert len(steps) >= 2
    for step in steps:
        model = LOADERS[role](finished_run, mesh, step)
        assert measure(model, rows, 1000)["nll"] == pytest.approx(logged[step], abs=1e-6)
    assert len({round(logged[step], 4) for step in steps}) == len(steps)
    assert (
        min(logged, key=logged.__getitem__)
        == read_json(finished_run.folder / role / MANIFEST)["best_step"]
    )


@pytest.mark.parametrize("role", LOADERS)
def test_best_and_last_are_what_the_manifest_says(finished_run, tmp_path, role):
    config = copy_run(finished_run, tmp_path)
    folder = config.folder / role
    steps = kept_steps(config, role)
    # As if the run had become worse: the best step is an early one.
    write_manifest(folder, {**read_manifest(folder), "best_step": steps[0]})
    mesh = make_mesh(config.mesh)

    def leaves(which, config=config):
        return jax.tree.leaves(LOADERS[role](config, mesh, which).trainable)

    for which, step in (("best", steps[0]), ("last", steps[-1])):
        expected = leaves(step)
        by_key = leaves(None, changed(config, {"export": {"state": which}}))
        for found in (leaves(which), by_key):
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not np.array_equal(leaves(steps[0])[-1], leaves(steps[-1])[-1])


def test_without_a_best_the_last_counts(finished_run, tmp_path):
    config = copy_run(finished_run, tmp_path)
    manifest = read_manifest(config.folder / "student")
    write_manifest(config.folder / "student", {**manifest, "best_step": None})
    mesh = make_mesh(config.mesh)
    pair = (
        load_student(config, mesh, which).trainable for which in ("best", manifest["last_step"])
    )
    jax.tree.map(np.testing.assert_array_equal, *pair)


@pytest.mark.parametrize("role", LOADERS)
def test_an_unfinished_stage_is_a_sentence(finished_run, tmp_path, role):
    config = copy_run(finished_run, tmp_path)
    unfinish(config, role, 0)
    with pytest.raises(UserError) as refused:
        LOADERS[role](config, make_mesh(config.mesh), "last")
    assert str(refused.value) == (
        f"{config.folder / role} is not complete; run its stage again, which continues it."
    )


def test_a_step_that_is_not_kept_is_a_sentence(finished_run):
    config = finished_run
    with pytest.raises(UserError) as refused:
        load_student(config, make_mesh(config.mesh), 777)
    steps = kept_steps(config, "student")
    message = str(refused.value)
    assert message.startswith(
        f"{config.folder / 'student'} keeps no checkpoint of step 777 (there: "
    )
    assert all(str(step) in message for step in steps)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(finished_run, tmp_path, how):
    """A damaged model is reported and never replaced by another."""
    config = copy_run(finished_run, tmp_path)
    last = read_json(config.folder / "student" / MANIFEST)["last_step"]
    folder = config.folder / "student" / "checkpoints" / str(last)
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "flipped":
        largest.write_bytes(bytes(data))
    elif how == "cut":
        largest.write_bytes(bytes(data[: len(data) // 2]))
    else:
        largest.unlink()
    with pytest.raises(UserError, match=f"the checkpoint of step {last} is damaged") as refused:
        load_student(config, make_mesh(config.mesh), "last")
    assert largest.name in str(refused.value)
