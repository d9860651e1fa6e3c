"""Eqs. 6 and 11: values, metrics, and micro-batches that add up to the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.losses import (
    BATCH_REDUCTIONS,
    alignment_objective,
    batch_count,
    batch_mean,
    distill_objective,
    dpo_loss,
    example_terms,
    mixed_objective,
    nll,
    preference_metrics,
    reduce_examples,
    token_logps,
    token_reduction,
    topk_kl,
    topk_logps,
    weighted_kl,
)

NLL = (jnp.float32(6.0), jnp.float32(4.0))
PREFERENCE = (jnp.float32(2.0), jnp.float32(8.0))


def test_alignment_objective_is_the_weighted_sum_of_means():
    loss, metrics = alignment_objective(NLL, PREFERENCE, nll_weight=2.0, preference_weight=4.0)
    assert loss == 2 * 1.5 + 4 * 0.25
    assert batch_mean(metrics["nll"]) == 1.5 and batch_mean(metrics["preference"]) == 0.25
    np.testing.assert_allclose(batch_mean(metrics["preference_to_nll"]), 1 / 3, rtol=1e-6)
    loss, metrics = alignment_objective(NLL)
    assert loss == 1.5 and set(metrics) == {"nll"}


def test_alignment_objective_reduces_pair_metrics_over_valid_pairs():
    pairs = [jnp.array([-3.0, -4, jnp.nan]), jnp.array([-5.0, -1, -2]), jnp.full(3, -4.0),
             jnp.full(3, -4.0)]  # fmt: skip
    mask = jnp.array([1, 1, 0])
    loss, metrics = alignment_objective(
        NLL,
        reduce_examples(dpo_loss(*pairs, beta=1.0), mask),
        pair_metrics=preference_metrics(*pairs, beta=1.0),
        pair_mask_B=mask,
    )
    expected = 1.5 + (np.log1p(np.exp(-2)) + np.log1p(np.exp(3))) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert batch_mean(metrics["reward_accuracy"]) == 0.5
    assert batch_mean(metrics["reward_margin"]) == -0.5
    with pytest.raises(ValueError, match="pair_mask_B"):
        alignment_objective(NLL, PREFERENCE, pair_metrics={})


def test_distill_objective():
    kl = (jnp.float32(1.0), jnp.float32(2.0))
    loss, metrics = distill_objective(NLL, kl, alpha=10.0, kl=(2.0, 2.0), sample_weight=(1.0, 2.0))
    assert loss == 1.5 + 5
    np.testing.assert_allclose(batch_mean(metrics["kl_to_nll"]), 5 / 1.5, rtol=1e-6)
    assert batch_mean(metrics["weighted_kl"]) == 0.5 == batch_mean(metrics["sample_weight"])
    assert batch_mean(metrics["kl"]) == 1
    loss, metrics = distill_objective(NLL, kl, alpha=10.0, nll_weight=0.0)
    assert loss == 5 and batch_mean(metrics["nll"]) == 1.5
    # Without a teacher's answer in the batch only soft labels count, and nothing is NaN.
    loss, metrics = distill_objective((0.0, 0.0), kl, alpha=10.0)
    assert loss == 5 and batch_mean(metrics["nll"]) == 0


def test_mixed_objective():
    terms = {"policy_gradient": NLL, "single_step_kl": PREFERENCE, "anchor": (0.0, 0.0)}
    weights = {"policy_gradient": 1.0, "single_step_kl": 2.0, "anchor": 3.0}
    loss, metrics = mixed_objective(terms, weights)
    assert loss == 1.5 + 2 * 0.25 + 0
    assert {name: float(batch_mean(term)) for name, term in metrics.items()} == {
        "policy_gradient": 1.5, "single_step_kl": 0.25, "anchor": 0.0,
    }  # fmt: skip
    # With the counts of the whole batch, a micro-batch gives its share.
    loss, metrics = mixed_objective(terms, weights, counts={"policy_gradient": 12.0})
    assert loss == 0.5 + 2 * 0.25 and batch_mean(metrics["policy_gradient"]) == 1.5
    # With two terms it equals the student's objective.
    pair = {"nll": NLL, "kl": PREFERENCE}
    distilled, _ = distill_objective(NLL, PREFERENCE, alpha=10.0, nll_weight=0.5)
    assert mixed_objective(pair, {"nll": 0.5, "kl": 10.0})[0] == distilled
    slopes = jax.grad(lambda x: mixed_objective({"nll": (x, 4.0)}, {"nll": 2.0})[0])(6.0)
    assert slopes == 0.5
    assert jax.grad(lambda x: mixed_objective({"a": (x, 4.0)}, {"a": 2.0})[1]["a"].total)(6.0) == 0
    for wrong in (({}, {}), (pair, {"nll": 1.0}), (pair, {"nll": 1.0, "kl": 1.0, "other": 1.0})):
        with pytest.raises(ValueError, match="under its name"):
            mixed_objective(*wrong)
    with pytest.raises(ValueError, match="counts other"):
        mixed_objective(pair, {"nll": 1.0, "kl": 1.0}, counts={"other": 1.0})


def test_metrics_carry_no_gradient():
    def ratio(x):
        return distill_objective((x, 1.0), (x * x, 1.0), alpha=3.0)[1]["kl_to_nll"].total

    assert jax.grad(ratio)(jnp.float32(2.0)) == 0


@pytest.mark.parametrize("reduction", BATCH_REDUCTIONS)
def test_micro_batches_add_up_to_the_batch(reduction):
    """Loss, gradient and metrics of unequal parts add up, with the counts of the whole batch."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(5, 4, 6)), jnp.float32)
    labels = rng.integers(6, size=(5, 4))
    ids = np.argsort(rng.random((5, 4, 6)))[..., :3]
    logps = np.log(rng.dirichlet(np.ones(4), size=(5, 4))[..., :3])
    mask = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    weight = rng.random(5)
    scale = jnp.float32(1.3)
    count = batch_count(mask, reduction=reduction)

    of_tokens = token_reduction(reduction)

    def objective(scale, rows, given):
        x, m = scale * logits[rows], mask[rows]
        nll_B = nll(token_logps(x, labels[rows]), m, reduction=of_tokens)
        student = topk_logps(x, ids[rows])
        kl_B = weighted_kl(
            topk_kl(student, (logps[rows], None), m, reduction=of_tokens), weight[rows]
        )
        terms = (example_terms(value_B, m, reduction=reduction) for value_B in (nll_B, kl_B))
        return distill_objective(*terms, alpha=10.0, nll_count=given, kl_count=given)

    def run(rows, given=None):
        return jax.jit(lambda s: jax.value_and_grad(objective, has_aux=True)(s, rows, given))(scale)

    (loss, metrics), grad = run(slice(0, 5))
    parts = [run(rows, count) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    np.testing.assert_allclose(sum(p[0][0] for p in parts), loss, rtol=1e-5)
    np.testing.assert_allclose(sum(p[1] for p in parts), grad, rtol=1e-5)
    for name, whole in metrics.items():
        added = [sum(p[0][1][name][field] for p in parts) for field in (0, 1)]
        np.testing.assert_allclose(batch_mean(added), batch_mean(whole), rtol=1e-5)
