"""RS-KD: draws are stored and reproducible, and have the gradient of the whole vocabulary."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import distill, score
from proxykd_jax.config import Config
from proxykd_jax.data.corpus import open_corpus
from proxykd_jax.data.drawn_labels import DrawnLabels
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.losses import draw_labels, topk_kl_tokens
from proxykd_jax.losses.sampled_labels import drawn_cross_entropy_tokens, drawn_label_tokens
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.restore import load_aligned_proxy
from tests.baselines.runs import (
    ONE_STEP,
    answer_logps,
    arrays_of,
    changed,
    check_stopped_run_equals_unbroken,
    first_step,
    mean_nll,
    method_recipe,
    untrained_student,
)

# The shortest alignment is enough, because the tests concern what comes after it.
SHORT = {"align": {"alignment": "warmup", "warmup_max_steps": 2}}
SPLITS = ("warmup", "align", "distill")
VOCAB = 46


def drawing(files: Path, runs: Path, method: dict[str, Any], *changes: Any) -> Config:
    return method_recipe(files, runs, {"name": "random_labels", **method}, SHORT, *changes)


@pytest.fixture(scope="module")
def finished(tiny_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    runs = tmp_path_factory.mktemp("random")
    config = drawing(tiny_files, runs, {"draws": 20}, ONE_STEP)
    distill.main(config)
    return config


def other_draws(config: Config, runs: Path, method: dict[str, Any]) -> Config:
    """Copies the run with its proxy and soft labels, but without drawn labels."""
    shutil.copytree(config.folder, runs / config.name)
    copy = changed(config, {"runs_dir": str(runs), "method": method})
    for name in ("drawn_labels", "student", "export"):
        shutil.rmtree(copy.folder / name)
    return copy


def targets_of(config: Config) -> list[np.ndarray]:
    """Returns t of each row, ``[R, V]`` in float64."""
    method, corpus = config.method, open_corpus(config.folder / "corpus")
    found = []
    for name in SPLITS:
        rows = list(corpus.split(name))
        store = DrawnLabels(
            config.folder / "drawn_labels",
            name,
            vocab_size=corpus.vocab_size,
            num_draws=method.draws,
            weighted=method.proposal_power != 1,
        )
        for drawn in store.read(range(len(rows)), [row.row_id for row in rows]):
            t_RV = np.zeros((len(drawn.ids), VOCAB))
            places = np.arange(len(drawn.ids))[:, None]
            target = drawn.counts / method.draws * drawn.weights.astype(np.float64)
            np.add.at(t_RV, (places, drawn.ids), target)
            found.append(t_RV)
    return found


def rows_of(config: Config) -> list[Any]:
    corpus = open_corpus(config.folder / "corpus")
    return [row for name in SPLITS for row in corpus.split(name)]


def scorer_probs(config: Config) -> list[np.ndarray]:
    proxy = load_aligned_proxy(config, make_mesh(config.mesh))
    return [np.exp(logps) for logps in answer_logps(proxy, rows_of(config))]


@pytest.mark.parametrize("power", [1.0, 0.7])
def test_the_stored_targets_are_unbiased(finished: Config, tmp_path: Path, power: float):
    """Compares the sum of t - p over all positions with its standard deviation. With another power
    of the proposal it vanishes only if the weights are right."""
    config = other_draws(finished, tmp_path, {"draws": 40, "proposal_power": power})
    score.main(config)
    p_PV, t_PV = (np.concatenate(x) for x in (scorer_probs(config), targets_of(config)))
    proposal_PV = p_PV**power / (p_PV**power).sum(-1, keepdims=True)
    variance_PV = (p_PV**2 / proposal_PV - p_PV**2) / 40
    z_V = (t_PV - p_PV).sum(0) / np.sqrt(variance_PV.sum(0))
    assert np.abs(z_V).max() < 4.5
    # chi-square of all entries: they differ from p by as much as N draws do
    assert ((t_PV - p_PV) ** 2).sum() / variance_PV.sum() == pytest.approx(1, abs=0.1)
    if power != 1:
        naive_V = (t_PV / t_PV.sum(-1, keepdims=True) - proposal_PV).sum(0)
        assert np.abs(naive_V).max() > 0.1  # the weights make a difference


def test_its_loss_is_the_cross_entropy_with_the_stored_targets(finished: Config):
    line = first_step(finished)
    rows = rows_of(finished)
    q = answer_logps(untrained_student(finished), rows)
    ces = [-(t * lq).sum(-1).mean() for t, lq in zip(targets_of(finished), q, strict=True)]
    assert line["cross_entropy"] == pytest.approx(np.mean(ces), rel=1e-4)
    assert "kl" not in line
    assert line["nll"] == pytest.approx(mean_nll(q, rows), rel=1e-4)
    assert line["loss"] == pytest.approx(
        line["nll"] + 10 * line["weighted_cross_entropy"], rel=1e-5
    )
    assert abs(line["weighted_cross_entropy"] / line["cross_entropy"] - 1) > 1e-4


def test_the_tail_key_changes_nothing(finished: Config, tmp_path: Path):
    shutil.copytree(finished.folder, tmp_path / finished.name)
    other = changed(finished, {"runs_dir": str(tmp_path), "distill": {"tail": "zero"}})
    for name in ("student", "export"):
        shutil.rmtree(other.folder / name)
    before, after = first_step(finished), first_step(other)
    assert {k: v for k, v in before.items() if "time" not in k} == {
        k: v for k, v in after.items() if "time" not in k
    }


def test_a_killed_drawing_goes_on_to_the_same_bytes(finished: Config, tmp_path, monkeypatch):
    """Some parts are lost and some are there; batches may differ too."""
    from proxykd_jax.baselines import random_labels

    config = other_draws(finished, tmp_path, {})
    parts = iter(range(2))

    def stop() -> None:
        if next(parts, None) is None:
            raise Stopped("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(random_labels, "stop_if_wanted", stop)
        with pytest.raises(Stopped):
            score.main(config)
    some = arrays_of(config.folder / "drawn_labels")
    score.main(changed(config, {"score": {"batch_size": 7}}))
    whole = arrays_of(finished.folder / "drawn_labels")
    assert arrays_of(config.folder / "drawn_labels") == whole
    assert 0 < len(some) < len(whole)


@pytest.mark.slow  # the quick tests stop Proxy-KD, which resumes in the same loop
def test_a_stopped_run_equals_an_unbroken_one(tiny_files, tmp_path, monkeypatch):
    config = drawing(tiny_files, tmp_path / "whole", {"draws": 8})
    check_stopped_run_equals_unbroken(config, tmp_path / "stopped", monkeypatch, 4)


def test_the_mean_gradient_is_the_whole_vocabularys_and_the_top_ks_is_not():
    """The error falls like 1 / sqrt(draws); that of the top k remains."""
    rng = np.random.default_rng(0)
    p_logits, q_logits = (jnp.asarray(rng.normal(0, 1, (1, 6, 30)), jnp.float32) for _ in range(2))
    p = jax.nn.log_softmax(p_logits)

    def drawn_grad(index: jax.Array) -> jax.Array:
        drawn = draw_labels(
            p_logits, jax.random.key(0), num_draws=5, row_ids_B=index[None].astype(jnp.uint32)
        )
        log_t = jnp.log(drawn.counts_BLK / 5)

        def loss(logits: jax.Array) -> jax.Array:
            q_BLK = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn.ids_BLK, axis=-1)
            return drawn_cross_entropy_tokens(q_BLK, log_t).sum()

        return jax.grad(loss)(q_logits)

    top = jnp.argsort(-p, axis=-1)[..., :5]

    def topk_loss(logits: jax.Array) -> jax.Array:
        q = jax.nn.log_softmax(logits)
        kept = [jnp.take_along_axis(x, top, axis=-1) for x in (q, p)]
        tails = [jnp.log1p(-jnp.exp(x).sum(-1)) for x in kept]
        return topk_kl_tokens(*zip(kept, tails, strict=True), tail="zero").sum()

    whole = jax.nn.softmax(q_logits) - jnp.exp(p)
    scale = jnp.linalg.norm(whole)
    grads = jax.jit(lambda: jax.lax.map(drawn_grad, jnp.arange(4000)))()
    few, many = (jnp.linalg.norm(grads[:n].mean(0) - whole) / scale for n in (40, 4000))
    # The variance of t_i is p_i (1 - p_i) / N.
    deviation = jnp.sqrt(jnp.sum(jnp.exp(p) * (1 - jnp.exp(p))) / 5) / scale
    assert 0.7 < float(few / (deviation / np.sqrt(40))) < 1.4
    assert 0.7 < float(many / (deviation / np.sqrt(4000))) < 1.4
    biased = jnp.linalg.norm(jax.grad(topk_loss)(q_logits) - whole) / scale
    assert float(biased) > 0.2


def test_the_gathered_form_is_the_loss_of_all_logits():
    rng = np.random.default_rng(1)
    p, q = (jnp.asarray(rng.normal(0, 1, (2, 3, 11)), jnp.float32) for _ in range(2))
    drawn = draw_labels(
        p,
        jax.random.key(0),
        num_draws=9,
        row_ids_B=np.arange(2, dtype=np.uint32),
        proposal_power=0.8,
    )
    log_t = jnp.log(drawn.counts_BLK / 9 * drawn.weights_BLK)
    q_BLK = jnp.take_along_axis(jax.nn.log_softmax(q), drawn.ids_BLK, axis=-1)
    expected = drawn_label_tokens(
        q, drawn.ids_BLK, drawn.counts_BLK, num_draws=9, weights_BLK=drawn.weights_BLK
    )
    np.testing.assert_allclose(drawn_cross_entropy_tokens(q_BLK, log_t), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "method, change, said",
    [
        ({"draws": 0}, {}, "method.draws: should be greater than 0"),
        ({"proposal_power": -1}, {}, "method.proposal_power: should be greater than 0"),
        ({}, {"distill": {"alpha": 0}}, "random_labels with distill.alpha 0"),
        (
            {},
            {"score": {"temperature": 2}},
            "score.temperature: method.name random_labels requires",
        ),
    ],
)
def test_mistakes_are_sentences(tiny_files, tmp_path, method, change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        drawing(tiny_files, tmp_path, method, change)
