"""distill.main on a tiny run: its loss, the soft labels it accepts, and when it stops."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from proxykd_jax import distill, score
from proxykd_jax.artifacts import MANIFEST, read_json, read_manifest, write_manifest
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.soft_labels import open_soft_labels
from proxykd_jax.errors import UserError
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.models.decoder import forward
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training import phase
from proxykd_jax.training.restore import load_student
from tests.tiny_run import (
    changed,
    copy_run,
    files_of,
    log_lines,
    recipe,
    scripted_validation,
    whole_logps,
    without_student,
)

ALL = ("warmup", "align", "distill", "fresh")


def student_by(finished_run: Config, runs: Path, **section: Any) -> Config:
    """Copies the run without its student, with other keys of ``distill``."""
    return without_student(finished_run, runs, {"distill": section})


# --- the loss -------------------------------------------------------------------------------------


class Reference:
    """The parts of eq. 11 for every row that the student sees, from whole softmaxes in float64.

    Attributes (n rows):
      nll, kl: means over an answer's tokens.
      loglik, length: the proxy's summed log-likelihood, and the number of tokens.
      split: name of each row's split.
    """

    def __init__(self, config: Config, splits: tuple[str, ...]) -> None:
        corpus, labels = (
            open_corpus(config.folder / "corpus"),
            open_soft_labels(config.folder / "soft_labels"),
        )
        model = load_student(config, make_mesh(config.mesh), 0)
        self.nll, self.kl, self.loglik, self.length, self.split = [], [], [], [], []
        for name in splits:
            rows = corpus.split(name)
            if name == "fresh":
                rows = AnsweredSplit(rows, SampleStore(config.folder / "samples" / "fresh"))
            read = rows.read(range(len(rows)))
            logps_BLV = whole_logps(model, [row.tokens for row in read])
            found = labels.read(name, range(len(rows)))
            for b, (row, stored) in enumerate(zip(read, found, strict=True)):
                places = np.arange(row.prompt_length, len(row.tokens))
                q_RV = logps_BLV[b, places - 1]
                q_RK = np.take_along_axis(q_RV, stored.ids, axis=-1)
                q_tail = np.log1p(-np.exp(q_RK).sum(-1))
                p_RK, p_tail = stored.logps.astype(np.float64), stored.tail_logps
                kl_R = (np.exp(p_RK) * (p_RK - q_RK)).sum(-1) + np.exp(p_tail) * (p_tail - q_tail)
                self.kl.append(kl_R.mean())
                self.nll.append(-q_RV[np.arange(len(places)), row.tokens[places]].mean())
                self.loglik.append(stored.gold_logps.astype(np.float64).sum())
                self.length.append(len(places))
                self.split.append(name)

    def weights(self, *, enabled: bool, loglik: str, normalize: bool) -> np.ndarray:
        """Returns the weights of eq. 9 on each split, and 1 for fresh prompts."""
        weights = np.ones(len(self.kl))
        for name in set(self.split) - {"fresh"}:
            inside = np.array(self.split) == name
            values = np.array(self.loglik)[inside]
            if loglik == "token_mean":
                values = values / np.array(self.length)[inside]
            w = 1 / (1 + np.exp(-(values - values.mean()) / values.std()))
            if enabled:
                weights[inside] = w / w.mean() if normalize else w
        return weights


@pytest.mark.parametrize(
    "weights",
    [
        {"enabled": True, "loglik": "sum", "normalize": False},
        {"enabled": True, "loglik": "token_mean", "normalize": True},
        {"enabled": False, "loglik": "sum", "normalize": False},
    ],
    ids=["as_printed", "recommended", "off"],
)
def test_the_first_loss_is_eq_11_with_the_weights_of_eq_9(finished_run, tmp_path, weights):
    """One batch holds all rows: D and the fresh prompts, which have no NLL and weight 1."""
    one_batch = {"batch_size": 160, "max_steps": 1, "alpha": 7.0, "weights": weights}
    config = student_by(finished_run, tmp_path, **one_batch)
    distill.main(config)
    (line,) = (line for line in log_lines(config, "distill") if "loss" in line)
    found = Reference(config, ALL)
    w, kl = found.weights(**weights), np.array(found.kl)
    teachers = np.array(found.split) != "fresh"
    assert 5 < (~teachers).sum() < teachers.sum()
    nll = np.array(found.nll)[teachers].mean()
    assert line["nll"] == pytest.approx(nll, rel=1e-4)
    assert line["kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert line["sample_weight"] == pytest.approx(w.mean(), rel=1e-4)
    assert line["weighted_kl"] == pytest.approx((w * kl).mean(), rel=1e-4)
    assert line["loss"] == pytest.approx(nll + 7.0 * (w * kl).mean(), rel=1e-4)
    # The differences between the cases exceed the tolerance.
    assert (abs((w * kl).mean() / kl.mean() - 1) > 0.002) == weights["enabled"]
    assert abs(np.array(found.nll).mean() / nll - 1) > 0.002


def test_alpha_0_is_plain_fine_tuning(tiny_files, tmp_path):
    """No proxy is loaded, and an independent training loop gives the same student."""
    section = {"alpha": 0.0, "data": "distill", "epochs": 3, "max_steps": None, "batch_size": 64}
    config = recipe(tiny_files, tmp_path, {"distill": {**section, "stop": {"enabled": False}}})
    result = distill.main(config)
    assert result.last_step == 3
    assert {path.name for path in config.folder.iterdir() if path.is_dir()} == {
        "corpus",
        "student",
        "export",
    }
    rows = open_corpus(config.folder / "corpus").split("distill")
    assert 40 < len(rows) <= 64  # each step sees all rows, so their order does not matter
    tokens_BL = np.zeros((len(rows), 17), np.int32)
    mask_BL = np.zeros((len(rows), 16), np.float32)
    for b, row in enumerate(rows.read(range(len(rows)))):
        tokens_BL[b, : len(row.tokens)] = row.tokens
        mask_BL[b, row.prompt_length - 1 : len(row.tokens) - 1] = 1
    mesh = make_mesh(config.mesh)
    start = load_student(config, mesh, 0)

    @jax.jit
    @jax.value_and_grad
    def loss_of(params: Any) -> jax.Array:
        logits = forward(params, None, jnp.asarray(tokens_BL[:, :-1]), config=start.config)
        logps = jax.nn.log_softmax(logits, axis=-1)
        gold = jnp.take_along_axis(logps, tokens_BL[:, 1:, None], axis=-1)[..., 0]
        return -jnp.mean(jnp.sum(gold * mask_BL, axis=-1) / jnp.sum(mask_BL, axis=-1))

    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    params = start.trainable
    state, losses = optimizer.init(params), []
    for _ in range(3):
        loss, grads = loss_of(params)
        losses.append(float(loss))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    logged = [line["nll"] for line in log_lines(config, "distill") if "nll" in line]
    np.testing.assert_allclose(logged, losses, rtol=1e-5)
    assert losses[2] < losses[0] - 0.1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        params,
        load_student(config, mesh, "last").trainable,
    )


# --- the soft labels ------------------------------------------------------------------------------


def rewritten(config: Config, part: str, key: str, value: Any) -> None:
    path = config.folder / "soft_labels" / MANIFEST
    manifest = read_manifest(path.parent)
    assert manifest[part][key] != value
    write_manifest(path.parent, {**manifest, part: {**manifest[part], key: value}})


@pytest.mark.parametrize(
    "part, key, value",
    [
        ("inputs", "proxy", {"stage": "another", "step": 3}),
        ("inputs", "tokenizer", "another"),
        ("inputs", "template", "another"),
        ("inputs", "corpus", "another"),
        ("settings", "temperature", 2.0),
        ("settings", "top_k", 5),
    ],
)
def test_soft_labels_of_something_else_are_refused(finished_run, tmp_path, part, key, value):
    config = student_by(finished_run, tmp_path)
    rewritten(config, part, key, value)
    with pytest.raises(UserError, match=f"soft_labels was made with other settings:\n  {key}"):
        distill.main(config)
    assert not (config.folder / "student").exists()


def test_the_labels_of_a_run_with_another_proxy_are_refused(finished_run, tiny_files, tmp_path):
    """The folder is copied from a run whose proxy was not aligned."""
    other = recipe(tiny_files, tmp_path, {"align": {"alignment": "none"}}, name="other")
    score.main(other)
    config = student_by(finished_run, tmp_path)
    shutil.rmtree(config.folder / "soft_labels")
    shutil.copytree(other.folder / "soft_labels", config.folder / "soft_labels")
    with pytest.raises(UserError, match=r"proxy\.stage"):
        distill.main(config)


def test_a_student_is_refused_when_its_labels_were_made_anew(finished_run, tmp_path):
    """The stage records the store's identity, so a student never learns from two proxies."""
    config = copy_run(finished_run, tmp_path)
    shutil.rmtree(config.folder / "soft_labels")
    config = changed(config, {"score": {"top_k": 5}})
    with pytest.raises(UserError, match=r"student was made with other settings:\n  soft_labels"):
        distill.main(config)


# --- when it stops --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nlls, best, last",
    [
        # untrained, then after steps 2, 4, 6, ...: training ends after two without a new best
        ([5.0, 4.0, 3.0, 3.1, 3.2], 4, 8),
        ([5.0, 4.0, 3.0, 3.1, 2.9, 3.0, 3.0], 8, 12),
        ([5.0, 6.0, 6.5, 7.0], 0, 6),
        ([5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 4.3], 14, 14),
    ],
)
def test_it_stops_where_validation_no_longer_improves(
    finished_run, tmp_path, monkeypatch, nlls, best, last
):
    left = scripted_validation(monkeypatch, [*nlls, *[nlls[-1]] * 2])
    stop = {"enabled": True, "every": 2, "patience": 2}
    config = student_by(finished_run, tmp_path, epochs=9, max_steps=14, stop=stop)
    result = distill.main(config)
    assert (result.best_step, result.last_step) == (best, last)
    assert len(left) == 0  # the last two values are for the comparison of the exported student
    steps = [line["step"] for line in log_lines(config, "distill") if "loss" in line]
    assert steps == list(range(1, last + 1))
    # Best and last are both kept; export.state chooses between them.
    mesh = make_mesh(config.mesh)
    states = [
        jax.tree.leaves(load_student(config, mesh, which).trainable) for which in (best, last)
    ]
    for which, state in (("best", states[0]), ("last", states[1])):
        chosen = changed(config, {"export": {"state": which}})
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.leaves(load_student(chosen, mesh).trainable),
            state,
        )
    assert (best == last) == np.array_equal(states[0][0], states[1][0])


def test_without_stopping_it_takes_all_steps(finished_run, tmp_path, monkeypatch):
    # Validations of the untrained student, at the end, and two of the export.
    scripted_validation(monkeypatch, [5.0, 6.0, 6.0, 6.0])
    stop = {"enabled": False, "every": 2, "patience": 2}
    config = student_by(finished_run, tmp_path, epochs=9, max_steps=14, stop=stop)
    result = distill.main(config)
    assert (result.best_step, result.last_step) == (0, 14)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_no_number_stops_it_at_the_last_good_checkpoint(
    finished_run, tmp_path, monkeypatch, name
):
    make = phase.make_train_step

    def broken(*args: Any, **options: Any) -> Any:
        step = make(*args, **options)

        def bad(state: Any, frozen: Any, batch: Any) -> Any:
            state, metrics = step(state, frozen, batch)
            return state, {**metrics, name: jnp.nan} if int(state.step) == 5 else metrics

        return bad

    config = student_by(finished_run, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UserError) as stopped:
        patch.setattr(phase, "make_train_step", broken)
        distill.main(config)
    message = str(stopped.value)
    assert f"distill, train, step 5: {name} is nan. Last good checkpoint: step 4." in message
    assert "learning rate" in message
    assert sorted(os.listdir(config.folder / "student" / "checkpoints"))[-1] == "4"
    # Nothing of the bad step was kept: without it, the student equals the uninterrupted run's.
    distill.main(config)
    ours, theirs = (read_json(c.folder / "student" / MANIFEST) for c in (config, finished_run))
    assert ours["content"] == theirs["content"]


def test_a_finished_student_is_left_alone(finished_run):
    before = files_of(finished_run.folder, times=True)
    distill.main(finished_run)
    assert files_of(finished_run.folder, times=True) == before
