"""Rows, plans, labels and objectives of the study against what they stand for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.miniature import pretrain
from benchmarks.miniature import world as w
from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import offline, on_policy, seeds
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.models import logits_of
from benchmarks.paper_tables.training import plan_rows, planned
from benchmarks.paper_tables.vectorise import over_seeds
from proxykd_jax.data.collate import collate_rows
from proxykd_jax.models.params import init_params
from proxykd_jax.training.batches import make_plan, phase_seed
from proxykd_jax.training.state import ModelSpec

MODEL = pretrain.model_config(16, 24, 1)
SPEC = ModelSpec(MODEL, "full", "float32", "none")


@pytest.fixture(scope="module")
def rows() -> seeds.Rows:
    world = w.make_worlds(3, "fmt").teacher
    prompts = w.PromptPool(3).take(40)
    answers = w.sample_answers(world, prompts, np.random.default_rng(0))
    return seeds.Rows.of(seeds.token_rows(prompts, seeds._cut(answers)))


def test_rows_of_samples_are_collated_rows(rows: seeds.Rows) -> None:
    expected = collate_rows([[row] for row in rows.rows], s.ROW_LENGTH - 1, 1, len(rows.rows))
    # What stands beyond an answer's end must not matter.
    answers = offline.padded_answers(rows)
    found = on_policy.rows_of_samples(
        jnp.asarray(rows.prompts_NP), jnp.asarray(answers), jnp.asarray(rows.lengths)
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_plans_are_the_products(rows: seeds.Rows) -> None:
    config = s.Setting("fmt", "paper").config.distill
    lengths = np.array([len(row.tokens) - 1 for row in rows.rows])
    plan = make_plan(
        lengths,
        seed=phase_seed(7, "distill"),
        batch_size=config.batch_size,
        batching=config.batching,
        max_length=s.ROW_LENGTH,
    )
    expected = [batch.rows for epoch in range(3) for batch in plan(epoch)]
    found = plan_rows(len(lengths), config, 7, "distill", len(expected))
    assert [tuple(() if row < 0 else (row,) for row in step) for step in found] == expected
    with pytest.raises(ValueError, match="no rows"):
        plan_rows(0, config, 7, "distill", 1)


def test_padding_of_a_plan_takes_the_last_row(rows: seeds.Rows) -> None:
    (batch,) = [planned([rows.batch], [np.array([[0, -1]])])(0, 1)]
    assert batch.tokens_BL.shape[:3] == (1, 1, 2)
    assert batch.mask_BL[0, 0, 0].any() and not batch.mask_BL[0, 0, 1].any()
    assert not batch.example_mask_BS[0, 0, 1].any()


def test_over_seeds_is_the_function_of_each() -> None:
    x_SN = np.arange(6.0).reshape(3, 2)
    found = over_seeds(lambda factor, x: factor * x.sum(), num_shared=1)(np.float32(2), x_SN)
    np.testing.assert_array_equal(found, 2 * x_SN.sum(axis=1))


def test_true_labels_are_the_teachers(rows: seeds.Rows) -> None:
    world = w.make_worlds(3, "fmt").teacher
    teacher = seeds.AnalyticTeacher([world], [3])
    answers = offline.padded_answers(rows)
    (logps,) = teacher.logps([rows.prompts_NP], [answers])
    whole = offline.at_places(logps, rows.batch.tokens_BL.shape)
    said = np.take_along_axis(whole, rows.batch.labels_BL[..., None], axis=-1)[..., 0]
    # The teacher wrote these answers, so it finds each of their tokens possible.
    assert np.isfinite(said[rows.batch.mask_BL]).all()
    np.testing.assert_allclose(np.exp(whole).sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_divergence_has_no_gradient_at_the_scorer(rows: seeds.Rows, beta: float) -> None:
    params = init_params(jax.random.key(0), MODEL)
    other = init_params(jax.random.key(1), MODEL)
    objective = on_policy.DivergenceObjective(beta, "example_mean")

    def loss(params: object, scorer: object) -> jax.Array:
        batch = on_policy.ScoredRows(rows.batch, logits_of(MODEL, scorer, rows.batch))
        return objective.share(params, None, batch, objective.counts(batch), SPEC, None)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, params)
    assert abs(value) < 1e-6
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-6
    assert loss(params, other) > 1e-3


def test_minillm_counts_a_tokens_own_reward_once(rows: seeds.Rows) -> None:
    """At the last token nothing follows: there the loss is the exact reverse KL alone."""
    params, other = (init_params(jax.random.key(k), MODEL) for k in (0, 1))
    mask_BL = rows.batch.mask_BL
    last_BL = mask_BL & ~np.pad(mask_BL[:, 1:], ((0, 0), (0, 1)))
    batch = on_policy.ScoredRows(
        dataclasses.replace(rows.batch, mask_BL=last_BL), logits_of(MODEL, other, rows.batch)
    )
    minillm = on_policy.MiniLlmObjective(0.2, "token_mean")
    reverse = on_policy.DivergenceObjective(1.0, "token_mean")

    def gradient_of(objective: object) -> object:
        def loss(params: object) -> jax.Array:
            return objective.share(params, None, batch, objective.counts(batch), SPEC, None)[0]

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        gradient_of(minillm),
        gradient_of(reverse),
    )


def test_presets_differ_in_proxy_kd_alone() -> None:
    paper, recommended = (m.make_methods(s.Setting("fmt", preset)) for preset in s.PRESETS)
    assert set(paper) == set(recommended) == set(m.METHODS)
    for name in m.OF_NO_PRESET:
        assert paper[name] == recommended[name]
    assert paper[m.PROXY_KD].alpha == 100 and recommended[m.PROXY_KD].alpha == 10
    assert [source.prompts for source in paper[m.PROXY_KD].sources] == ["distill"]
    prompts = [source.prompts for source in recommended[m.PROXY_KD].sources]
    assert prompts == ["warmup", "align", "distill", "fresh"]


def test_no_method_but_the_ceiling_sees_the_teachers_distribution() -> None:
    for name, method in m.make_methods(s.Setting("fmt", "paper")).items():
        if isinstance(method, offline.Method):
            seen = any(source.labels == offline.TRUTH for source in method.sources)
            assert seen == (name == "teacher_logits")
