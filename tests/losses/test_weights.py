"""Weights of eq. 9 and their relation to length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.losses import alignment_weights, length_correlation, normalize_weights


def test_matches_the_formula():
    rng = np.random.default_rng(0)
    loglik = rng.normal(-300, 80, size=50)
    mean, std = loglik.mean(), loglik.std()
    expected = 1 / (1 + np.exp(-(loglik - mean) / std))
    got = jax.jit(alignment_weights)(loglik, mean, std)
    assert got.dtype == jnp.float32 and got.shape == (50,)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert alignment_weights(np.array([mean]), mean, std)[0] == pytest.approx(0.5)
    np.testing.assert_allclose(jax.vmap(alignment_weights, (0, None, None))(
        loglik[:, None], mean, std)[:, 0], got, rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_edges_are_finite(std):
    loglik = jnp.array([-jnp.inf, -5.0, -1e30, 1e30])
    value, grad = jax.value_and_grad(lambda x: alignment_weights(x, -5.0, std).sum())(loglik)
    assert np.isfinite(value) and np.isfinite(grad).all()
    weights = alignment_weights(loglik, -5.0, std)
    np.testing.assert_array_equal(weights, [0.5] * 4 if std == 0 else [0, 0.5, 0, 1])


def test_normalize_weights():
    weight = np.array([0.2, 0.4, 0.9])
    np.testing.assert_allclose(normalize_weights(weight).mean(), 1, rtol=1e-6)
    np.testing.assert_allclose(normalize_weights(weight, 0.5), weight / 0.5, rtol=1e-6)
    masked = normalize_weights(np.array([0.2, 0.4, np.nan]), example_mask_B=np.array([1, 1, 0]))
    np.testing.assert_allclose(masked[:2], [2 / 3, 4 / 3], rtol=1e-6)
    np.testing.assert_array_equal(normalize_weights(np.zeros(3)), 0)


def test_length_correlation():
    rng = np.random.default_rng(1)
    weight, length = rng.random(40), rng.integers(1, 90, size=40)
    mask = rng.random(40) < 0.7
    np.testing.assert_allclose(
        length_correlation(weight, length), np.corrcoef(weight, length)[0, 1], atol=1e-5
    )
    np.testing.assert_allclose(
        length_correlation(weight, length, example_mask_B=mask),
        np.corrcoef(weight[mask], length[mask])[0, 1],
        atol=1e-5,
    )
    spoiled = np.where(mask, weight, np.nan)
    assert np.isfinite(length_correlation(spoiled, length, example_mask_B=mask))
    assert length_correlation(np.full(4, 0.1), np.arange(4)) == 0
    assert length_correlation(weight[:4], np.full(4, 7)) == 0


def test_summed_loglikelihood_rewards_short_answers_and_the_mean_does_not():
    rng = np.random.default_rng(2)
    length = rng.integers(20, 400, size=2000)
    mean_logp = rng.normal(-1.0, 0.3, size=2000)
    correlation = {}
    for kind, loglik in (("sum", mean_logp * length), ("mean", mean_logp)):
        weight = alignment_weights(loglik, loglik.mean(), loglik.std())
        correlation[kind] = float(length_correlation(weight, length))
    assert correlation["sum"] < -0.7 and abs(correlation["mean"]) < 0.1


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        alignment_weights(np.ones(3), np.ones(3), 1.0)
    with pytest.raises(AssertionError):
        length_correlation(np.ones(3), np.ones(2))
