"""GAD: the discriminator, the adversarial loss on a batch, and a whole tiny run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from proxykd_jax.baselines import gad
from proxykd_jax.baselines.gad import (
    GadObjective,
    GadSpec,
    GadWarmupObjective,
    game_batch,
)
from proxykd_jax.baselines.gad_discriminator import init_discriminator, scores
from proxykd_jax.config import AxesConfig
from proxykd_jax.losses import batch_mean
from proxykd_jax.models.config import LoraConfig
from proxykd_jax.models.decoder import hidden_states
from proxykd_jax.models.lora import init_adapter
from proxykd_jax.models.params import init_params
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.model import Model
from proxykd_jax.training.restore import load_student
from proxykd_jax.training.state import ModelSpec, init_state
from proxykd_jax.training.steps import make_train_step
from tests.baselines.online import (
    IN_THE_MIDDLE,
    ONLINE,
    SHORT,
    answers,
    check_resumed,
    logps_of,
    loss_of,
    steps_of,
)
from tests.baselines.runs import method_recipe
from tests.training.conftest import VOCAB, tiny_config

GROUP = 3


def a_game(lora: bool = False):
    """Returns (spec, frozen, trainable); the discriminator's head is not zero."""
    config = tiny_config(LoraConfig(rank=2, alpha=4.0) if lora else None)
    params = init_params(jax.random.key(3), config)
    learns = init_adapter(jax.random.key(1), config) if lora else params
    spec = ModelSpec(config, "lora" if lora else "full", "float32", "none")
    student = Model(spec, params if lora else {}, learns, None)
    discriminator = init_discriminator(student, make_mesh(AxesConfig()))
    head = jax.random.normal(jax.random.key(4), (config.model_dim,))
    discriminator = {**discriminator, "score_head": {"kernel": head}}
    reference = jax.tree.map(lambda x: 1.05 * x, learns)
    trainable = {"student": learns, "discriminator": discriminator}
    frozen = {"base": student.frozen, "reference": reference}
    return GadSpec(spec, VOCAB), frozen, trainable


def a_batch(prompts: int = 4, seed: int = 0):
    """Returns a batch in which one place has no row and one sample has no token."""
    teacher = answers(prompts + 1, seed)
    del teacher[2]
    teacher = [teacher[0], *teacher[2:], None]
    samples = []
    for index, answer in enumerate(teacher):
        found = answers(GROUP + 3, seed + 7 + index)[3:]
        samples += [None] * GROUP if answer is None else found
    assert samples[1] is not None
    row = samples[1].row
    samples[1] = dataclasses.replace(samples[1], row=dataclasses.replace(row, tokens=row.prompt))
    return teacher, samples, game_batch(teacher, samples, 12)


def test_the_discriminator_reads_the_last_token_of_an_answer():
    """The reference is a forward pass over each row alone, including its end token."""
    spec, frozen, trainable = a_game()
    _, samples, batch = a_batch()
    rows = gad._flat(batch.samples).rows
    last_B = batch.sample_last_PG.reshape(-1)
    d = trainable["discriminator"]
    found = scores(frozen["base"], d, rows, jnp.asarray(last_B), spec.student)
    for b, answer in enumerate(samples):
        if answer is None:
            continue
        tokens_BL = jnp.asarray(answer.row.tokens)[None]
        hidden_BLD = hidden_states(d["body"], None, tokens_BL, config=spec.config)
        alone = hidden_BLD[0, -1] @ d["score_head"]["kernel"]
        np.testing.assert_allclose(found[b], alone, rtol=1e-4, atol=1e-5)
        assert rows.mask_BL[b].sum() == len(answer.row.answer)
    assert batch.samples.rows.tokens_BL.shape[:2] == (4, GROUP)
    assert not batch.teacher.rows.mask_BL[-1].any()


@pytest.mark.parametrize("ddof", [0, 1])
def test_the_games_loss_is_the_papers(ddof):
    """In float64: token mean of -A + 0.5 KL at a temperature, and the mean over pairs."""
    spec, frozen, trainable = a_game()
    teacher, samples, batch = a_batch()
    d = trainable["discriminator"]

    def score(answer):
        hidden = hidden_states(
            d["body"], None, jnp.asarray(answer.row.tokens)[None], config=spec.config
        )
        return float(hidden[0, -1] @ d["score_head"]["kernel"])

    rows = gad._flat(batch.samples).rows
    q, r = (logps_of(tree, rows, 0.8) for tree in (trainable["student"], frozen["reference"]))
    gold_q, gold_r = (np.take_along_axis(x, rows.labels_BL[..., None], -1)[..., 0] for x in (q, r))
    policy, kl, pairs = [], [], []
    for p, of_teacher in enumerate(teacher):
        if of_teacher is None:
            continue
        group = [g for g in range(GROUP) if len(samples[p * GROUP + g].row.answer)]
        found = np.array([score(samples[p * GROUP + g]) for g in group])
        pairs += list(np.log1p(np.exp(found - score(of_teacher))))
        advantage = (found - found.mean()) / (found.std(ddof=ddof) + 1e-6)
        for g, a in zip(group, advantage, strict=True):
            mask = rows.mask_BL[p * GROUP + g]
            delta = (gold_r - gold_q)[p * GROUP + g][mask]
            policy += [-a] * mask.sum()
            kl += list(np.exp(delta) - delta - 1)
    loss = loss_of(GadObjective(0.5, ddof, 0.8, "token_mean"), spec, frozen, batch)
    want = np.mean(policy) + 0.5 * np.mean(kl) + np.mean(pairs)
    np.testing.assert_allclose(loss(trainable), want, rtol=2e-4)
    assert np.mean(kl) > 0.01 and abs(np.mean(policy)) > 0.01


def test_student_and_discriminator_learn_apart_and_the_discriminator_never_rests():
    """Each has the gradient of its own loss; every leaf of both changes at every step."""
    spec, frozen, trainable = a_game()
    batch = a_batch()[2]
    objective = GadObjective(0.5, 1, 0.8, "token_mean")
    grads = jax.jit(jax.grad(loss_of(objective, spec, frozen, batch)))(trainable)
    alone = jax.jit(
        jax.grad(lambda t: batch_mean(gad._judge(spec.bind(frozen, t), batch, spec)[0]))
    )(trainable)
    for a, b in zip(*(jax.tree.leaves(g["discriminator"]) for g in (grads, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    assert not any(np.abs(x).any() for x in jax.tree.leaves(alone["student"]))

    optimizer = optax.adam(1e-3)
    step = make_train_step(spec, objective, optimizer, microbatches=1, seed=0)
    state = init_state(jax.tree.map(jnp.copy, trainable), optimizer)
    for _ in range(3):
        before = jax.tree.map(np.asarray, state.trainable)
        state, _ = step(state, frozen, batch)
        moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), state.trainable, before)
        assert all(jax.tree.leaves(moved))


def test_micro_batches_add_up_to_the_batch():
    spec, frozen, trainable = a_game()
    batch, found = a_batch()[2], []
    for parts in (1, 2):
        optimizer = optax.sgd(1.0)
        step = make_train_step(
            spec, GadObjective(0.5, 1, 0.8, "token_mean"), optimizer, microbatches=parts, seed=0
        )
        state = init_state(jax.tree.map(jnp.copy, trainable), optimizer)
        state, metrics = step(state, frozen, batch)
        found.append((state.trainable, metrics))
    for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_constant_of_a_prompt_changes_nothing(monkeypatch):
    spec, frozen, trainable = a_game()
    batch = a_batch()[2]
    objective = GadObjective(0.0, 1, 0.8, "token_mean")
    plain = loss_of(objective, spec, frozen, batch)(trainable)
    shift_P = np.array([3.0, -2.0, 0.5, 9.0], np.float32)

    def shifted_by(of_samples):
        return lambda *given: (
            scores(*given) + (shift_P if given[3].shape == (4,) else np.repeat(of_samples, GROUP))
        )

    monkeypatch.setattr(gad, "scores", shifted_by(shift_P))
    shifted = loss_of(objective, spec, frozen, batch)(trainable)
    np.testing.assert_allclose(shifted, plain, rtol=1e-4)
    monkeypatch.setattr(gad, "scores", shifted_by(shift_P + 1))
    assert abs(loss_of(objective, spec, frozen, batch)(trainable) - plain) > 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_a_new_discriminator_is_the_student_with_a_head_of_zeros(lora):
    spec, frozen, trainable = a_game(lora)
    student = Model(spec.student, frozen["base"], trainable["student"], None)
    fresh = init_discriminator(student, make_mesh(AxesConfig()))
    assert not np.asarray(fresh["score_head"]["kernel"]).any()
    body = {k: v for k, v in trainable["student"].items() if k != "lm_head"}
    assert all(
        jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), fresh["body"], body))
    )
    batch = a_batch()[2]
    both = {"student": trainable["student"], "discriminator": fresh}
    found = GadWarmupObjective("token_mean")
    models = spec.bind(frozen, both)
    loss, metrics = found.share(models, batch, found.counts(batch), spec, None)
    np.testing.assert_allclose(batch_mean(metrics["discriminator"]), np.log(2), rtol=1e-6)
    if not lora:
        rows = batch.teacher.rows
        gold = np.take_along_axis(
            logps_of(trainable["student"], rows), rows.labels_BL[..., None], -1
        )[..., 0]
        nll = -gold[rows.mask_BL].mean()
        np.testing.assert_allclose(loss, nll + np.log(2), rtol=1e-4)


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_keeps_student_and_discriminator_and_resumes_bitwise(tiny_files, tmp_path, trainable):
    method = {"name": "gad", "samples_per_prompt": 3, "discriminator_learning_rate": 5e-3, **ONLINE}
    student = {"student": {"trainable": trainable, "lora": {"rank": 2}}}
    config = method_recipe(tiny_files, tmp_path / "a", method, SHORT, student)
    assert config.needs == "nothing"
    check_resumed(config, tmp_path / "b", IN_THE_MIDDLE)
    warmup, train = steps_of(config, "warmup"), steps_of(config, "train")
    assert len(warmup) == 2 and len(train) == 4
    np.testing.assert_allclose(warmup[0]["discriminator"], np.log(2), rtol=1e-6)
    # The reference is the warmed-up student: the KL is zero at first, and then grows.
    assert train[0]["kl"] == pytest.approx(0, abs=1e-6) and train[-1]["kl"] > 1e-4
    assert not (config.folder / "proxy").exists()
    mesh = make_mesh(config.mesh)
    ends = [load_student(config, mesh, step).trainable for step in (2, "last")]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), *ends)))
