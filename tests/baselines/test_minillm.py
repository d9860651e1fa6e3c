"""MiniLLM: its gradient on two-token answers, the parts of a rollout, and a whole tiny run."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax import distill
from proxykd_jax.baselines import minillm
from proxykd_jax.baselines.beside_scorer import sampling_time_logps
from proxykd_jax.baselines.minillm import (
    MiniLlmObjective,
    inner_batches,
    rollout_batch,
    take_answers,
)
from proxykd_jax.baselines.rollouts import Answer, answer_batch
from proxykd_jax.config.online_methods import MiniLlm
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.training.checkpoint import Checkpoints
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.restore import load_student
from proxykd_jax.training.state import abstract_state
from tests.baselines.online import (
    IN_THE_MIDDLE,
    ONLINE,
    SHORT,
    answers,
    batch_of,
    check_resumed,
    logps_of,
    loss_of,
    pair,
    steps_of,
)
from tests.baselines.runs import method_recipe

# Two steps over two tokens: logits of the first token, and of the second after each first token.
STUDENT = (np.array([0.3, -0.2]), np.array([[0.5, 0.0], [-0.4, 0.1]]))
SCORER = (np.array([0.1, 0.4]), np.array([[0.0, 0.2], [0.3, -0.3]]))


class Tables:
    """Models that are tables of logits; they replace both forward passes."""

    config = None

    def bind(self, frozen, trainable):
        return {"student": trainable, "scorer": frozen}

    @staticmethod
    def both_logits(models, rows, spec, function, *arrays_BL, dropout_key=None):
        first_B = rows.labels_BL[:, 0]

        def logits(table):
            start_BV = jnp.broadcast_to(table[0], (len(first_B), 2))
            return jnp.stack([start_BV, jnp.asarray(table[1])[first_B]], axis=1)

        return function(logits(models["student"]), logits(models["scorer"]), *arrays_BL)


def _tables_loss(monkeypatch, method, *, scorer_share=0.0, one_step=False):
    """Returns (loss of the exact expectation over all answers, the student's table)."""
    monkeypatch.setattr(minillm, "both_logits", Tables.both_logits)
    pairs = list(itertools.product(range(2), range(2)))
    rows = [Answer(TokenRow(np.array([0, *p], np.int32), 1, str(p)), False, True) for p in pairs]
    drawn = answer_batch(rows, 3)
    assert drawn.rows.mask_BL.shape == (4, 8)
    drawn = jax.tree.map(lambda x: x[:, :2] if x.shape == (4, 8) else x, drawn)
    if one_step:
        drawn.rows.mask_BL[:, 1] = False
    student, scorer = (tuple(map(jnp.float32, table)) for table in (STUDENT, SCORER))

    def token_logps(table):
        first, second = (np.asarray(jax.nn.log_softmax(x)) for x in table)
        return np.array([[first[a], second[a, b]] for a, b in pairs], np.float32)

    q_BL, p_BL = token_logps(student), token_logps(scorer)
    drawn_from_BL = np.log(scorer_share * np.exp(p_BL) + (1 - scorer_share) * np.exp(q_BL))
    share_B = np.exp(drawn_from_BL.sum(axis=1))
    assert share_B.sum() == pytest.approx(1)
    objective = MiniLlmObjective.of(method)
    batch = rollout_batch(drawn, q_BL, p_BL, None, method)

    def loss(table):
        total = 0.0
        for b in range(4):
            row = jax.tree.map(lambda x, b=b: x[b : b + 1], batch)
            tokens = float(drawn.rows.mask_BL[b].sum())
            total += share_B[b] * tokens * loss_of(objective, Tables(), scorer, row)(table)
        return total

    return loss, student


@pytest.mark.parametrize(
    ("include_current", "expected"), [(False, 0.167244431), (True, 0.355247400)]
)
def test_the_expected_gradient_is_that_of_the_answers_kl(monkeypatch, include_current, expected):
    """(i) The value .355 is the result if a token's own reward is counted twice."""
    method = MiniLlm(
        teacher_mixing=0.0, length_normalize=False, clip=None, include_current=include_current
    )
    loss, student = _tables_loss(monkeypatch, method)
    np.testing.assert_allclose(jax.grad(loss)(student)[0], [expected, -expected], rtol=1e-4)


def test_the_pieces_of_the_tables_gradient(monkeypatch):
    method = MiniLlm(teacher_mixing=0.0, length_normalize=False, clip=None)
    loss, student = _tables_loss(monkeypatch, method, one_step=True)
    np.testing.assert_allclose(jax.grad(loss)(student)[0], [0.188002970, -0.188002970], rtol=1e-4)


def test_weights_make_the_mixtures_expectation_the_students(monkeypatch):
    """(ii) This is checked for one step."""
    options = {"length_normalize": False, "clip": None, "include_current": True}
    grads = {}
    for share in (0.0, 0.2):
        method = MiniLlm(teacher_mixing=share, **options)
        loss, student = _tables_loss(monkeypatch, method, scorer_share=share, one_step=True)
        grads[share] = jax.grad(loss)(student)[0]
    np.testing.assert_allclose(grads[0.2], grads[0.0], rtol=1e-4)
    # The test can fail: here answers of the mixture are weighted as if from the student.
    method = MiniLlm(teacher_mixing=0.0, **options)
    loss, student = _tables_loss(monkeypatch, method, scorer_share=0.2, one_step=True)
    assert abs(jax.grad(loss)(student)[0] / grads[0.0] - 1).max() > 5e-3


def test_a_constant_reward_gives_one_return_everywhere():
    """(iii) It is the same for every length and at every position but the last token's."""
    drawn = batch_of()
    old_BL = np.random.default_rng(0).normal(-2, 1, drawn.rows.mask_BL.shape).astype(np.float32)
    for normalize in (True, False):
        method = MiniLlm(length_normalize=normalize)
        batch = rollout_batch(drawn, old_BL, old_BL + 0.7, None, method)
        inner = drawn.rows.mask_BL.copy()
        inner[:, :-1] &= drawn.rows.mask_BL[:, 1:]
        inner[:, -1] = False
        found = batch.advantages_BL[inner]
        assert len(found) > 8 and np.allclose(found, 0.7, rtol=1e-5) == normalize
        assert not batch.advantages_BL[~inner].any()


@pytest.mark.parametrize("whiten", ["none", "responses", "padding_too"])
def test_more_padding_changes_nothing(whiten):
    """(iv) The exception is the authors' whitening, which includes padding."""
    spec, frozen, trainable = pair()
    method = MiniLlm(whiten=whiten, anchor="nll_on_scorer_text", anchor_kl_share=0.5)
    found = []
    for length in (12, 40):
        drawn = batch_of(max_length=length)
        logps = sampling_time_logps(trainable, frozen, drawn.rows, spec=spec)
        old_BL, scorer_BL = (np.asarray(x) for x in logps)
        batch = rollout_batch(drawn, old_BL, scorer_BL, drawn.rows, method)
        loss = loss_of(MiniLlmObjective.of(method), spec, frozen, batch)
        found.append(jax.jit(jax.value_and_grad(loss))(trainable))
    assert batch_of(max_length=40).rows.mask_BL.shape != batch_of().rows.mask_BL.shape
    for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
        if whiten != "padding_too":
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    if whiten == "padding_too":
        assert abs(found[0][0] - found[1][0]) > 1e-3


def test_the_first_loss_is_the_papers_with_its_anchor():
    """In float64: w KL(q||p) - A w, because rho is w before the first update and w < 1 + eps."""
    spec, frozen, trainable = pair()
    drawn = batch_of()
    method = MiniLlm(
        clip=None, anchor="nll_on_scorer_text", anchor_weight=3.0, anchor_kl_share=0.25
    )
    logps = sampling_time_logps(trainable, frozen, drawn.rows, spec=spec)
    old_BL, scorer_BL = (np.asarray(x) for x in logps)
    q = logps_of(trainable, drawn.rows)
    p = logps_of(frozen["scorer"][0], drawn.rows)
    gold = [np.take_along_axis(x, drawn.rows.labels_BL[..., None], -1)[..., 0] for x in (q, p)]
    mask = drawn.rows.mask_BL
    np.testing.assert_allclose(old_BL[mask], gold[0][mask], rtol=1e-4)
    np.testing.assert_allclose(scorer_BL[mask], gold[1][mask], rtol=1e-4)
    reward = gold[1] - gold[0]
    weight = 1 / (0.2 * np.exp(reward) + 0.8)
    total, count = 0.0, mask.sum()
    for b in range(len(mask)):
        places = np.flatnonzero(mask[b])
        for i, t in enumerate(places):
            later = reward[b, places[i + 1 :]]
            advantage = later.mean() if len(later) else 0.0
            kl = (np.exp(q[b, t]) * (q[b, t] - p[b, t])).sum()
            total += weight[b, t] * (kl - advantage)
    nll, forward_kl = -gold[0][mask].mean(), (np.exp(p) * (p - q)).sum(-1)[mask].mean()
    batch = rollout_batch(drawn, old_BL, scorer_BL, drawn.rows, method)
    loss = loss_of(MiniLlmObjective.of(method), spec, frozen, batch)
    want = total / count + 3.0 * (0.75 * nll + 0.25 * forward_kl)
    np.testing.assert_allclose(loss(trainable), want, rtol=2e-4)


def test_every_answer_is_in_one_update_of_an_epoch():
    there = np.array([True, False, True, True, True, False, True, True])
    found = list(inner_batches(there, 4, epochs=3, seed=1))
    assert len(found) == 6 and all(len(places) == 4 for places in found)
    orders = [np.concatenate(found[i : i + 2]) for i in (0, 2, 4)]
    for order in orders:
        assert sorted(order[order >= 0]) == [0, 2, 3, 4, 6, 7] and (order < 0).sum() == 2
    assert not np.array_equal(orders[0], orders[1])
    again = list(inner_batches(there, 4, epochs=3, seed=1))
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    taken = take_answers(answer_batch(answers(8), 12), np.array([3, 0, -1]))
    assert taken.rows.mask_BL.any(axis=1).tolist() == [True, True, False]
    assert not taken.sampled_B[2] and not taken.rows.example_mask_BS[2].any()


def test_rollouts_are_whole_updates(tiny_files, tmp_path):
    with pytest.raises(UserError, match=r"rollouts 20 .*multiple of distill.batch_size 8"):
        method_recipe(tiny_files, tmp_path, {"name": "minillm", "rollouts": 20}, SHORT)


def test_a_run_makes_its_updates_and_resumes_bitwise(tiny_files, tmp_path):
    method = {"name": "minillm", "rollouts": 16, "inner_epochs": 2, "whiten": "responses"}
    method |= {"anchor": "nll_on_scorer_text", **ONLINE}
    config = method_recipe(tiny_files, tmp_path / "a", method, SHORT)
    check_resumed(config, tmp_path / "b", IN_THE_MIDDLE)
    train = steps_of(config, "train")
    assert len(train) == 4 and all(line["student_share"] == 1.0 for line in train)
    # No answer is empty, so a step makes 2 x 2 updates.
    assert distill.main(config).results[0]["updates_a_step"] == 4
    assert adam_count(config) == 16


def adam_count(config) -> int:
    """Returns the number of updates in the optimizer of the last checkpoint."""
    mesh = make_mesh(config.mesh)
    student = load_student(config, mesh)
    target = abstract_state(student.trainable, make_optimizer(config.distill.optimizer, 1), mesh)
    checkpoints = Checkpoints(config.folder / "student")
    state, _ = checkpoints.restore(checkpoints.steps()[-1], target)
    checkpoints.close()
    return next(int(part.count) for part in state.opt_state if hasattr(part, "mu"))
