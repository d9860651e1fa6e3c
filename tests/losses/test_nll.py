"""nll and token_logps are compared with the float64 reference, also at the limits of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from proxykd_jax.losses import nll, token_logps

A_Q = np.array([[[1, 1, 0], [0.5, 0, -0.5], [0, 1, 0]]])
A_TOKENS = np.array([[0, 2, 1]])
A_MASK = np.array([[1, 1, 0]])


def nll_of(logits, labels, mask, **options):
    return nll(token_logps(logits, labels, mask), mask, **options)


def batch(seed=0, shape=(3, 5, 7), scale=3.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=scale, size=shape)
    labels = rng.integers(shape[-1], size=shape[:2])
    mask = rng.random(shape[:2]) < 0.6
    mask[0] = [0, 1, 0, 0, 1][: shape[1]]
    return logits, labels, mask


def test_fixture_a():
    np.testing.assert_allclose(nll_of(A_Q, A_TOKENS, A_MASK), [1.271132237], atol=5e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mask_type", [bool, np.int32, np.float32])
def test_matches_reference(reduction, mask_type):
    logits, labels, mask = batch()
    logps = np.take_along_axis(reference.log_softmax(logits), labels[..., None], -1)[..., 0]
    expected = reference.per_example(-logps, mask, reduction)
    got = nll_of(logits, labels, mask.astype(mask_type), reduction=reduction)
    assert got.dtype == jnp.float32 and got.shape == (3,)
    np.testing.assert_allclose(got, expected, rtol=2e-6)
    jitted = jax.jit(nll_of, static_argnames="reduction")
    np.testing.assert_allclose(jitted(logits, labels, mask, reduction=reduction), got, rtol=1e-6)


def test_matches_optax():
    logits, labels, _ = batch(1)
    logits = jnp.asarray(logits, jnp.float32)
    expected = -optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(labels))
    np.testing.assert_allclose(token_logps(logits, labels), expected, rtol=1e-5)


def test_bfloat16_input_is_computed_in_float32():
    logits, labels, mask = batch(2)
    logits = jnp.asarray(logits, jnp.bfloat16)
    expected = nll_of(logits.astype(jnp.float32), labels, mask)
    got = nll_of(logits, labels, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, expected)


def test_large_logits_keep_their_digits():
    logits = np.array([[[1e4, 1e4 + 1, 1e4 - 2]]])
    expected = reference.log_softmax(logits)[..., 2]
    np.testing.assert_allclose(token_logps(logits, np.array([[2]])), expected, rtol=1e-6)


def test_gradient_is_softmax_minus_one_hot():
    logits, labels, mask = batch(3)
    grad = jax.grad(lambda x: nll_of(x, labels, mask, reduction="sum").sum())(jnp.float32(logits))
    expected = np.exp(reference.log_softmax(logits)) - np.eye(7)[labels]
    np.testing.assert_allclose(grad, expected * mask[..., None], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask(bad):
    logits, labels, mask = batch(4)
    spoiled = np.where(mask[..., None], logits, bad)
    spoiled_labels = np.where(mask, labels, -100)

    def loss(x, y):
        return nll_of(x, y, mask).sum()

    value, grad = jax.value_and_grad(loss)(jnp.float32(spoiled), spoiled_labels)
    clean_value, clean_grad = jax.value_and_grad(loss)(jnp.float32(logits), labels)
    assert value == clean_value
    np.testing.assert_array_equal(grad, clean_grad)
    assert (np.asarray(grad)[~mask] == 0).all()


def test_asymmetric_mask_counts_the_positions_it_names():
    logits, labels, _ = batch(5, shape=(1, 4, 7))
    logps = np.take_along_axis(reference.log_softmax(logits), labels[..., None], -1)[0, :, 0]
    got = nll_of(logits, labels, np.array([[0, 1, 1, 0]]), reduction="sum")
    np.testing.assert_allclose(got, [-logps[1] - logps[2]], rtol=2e-6)


def test_empty_mask_gives_zero_and_no_gradient():
    logits, labels, mask = batch(6)
    value, grad = jax.value_and_grad(lambda x: nll_of(x, labels, np.zeros_like(mask)).sum())(
        jnp.float32(logits)
    )
    assert value == 0 and (np.asarray(grad) == 0).all()


def test_minus_infinity_and_certainty_have_finite_gradients():
    logits = jnp.array([[[0.0, -jnp.inf, 1.0], [200.0, 0.0, 0.0], [0.0, -jnp.inf, 1.0]]])
    labels = jnp.array([[0, 0, 1]])
    values = -token_logps(logits, labels)
    np.testing.assert_allclose(values[0, :2], [np.log(1 + np.e), 0], rtol=1e-6)
    assert values[0, 2] == jnp.inf
    grad = jax.grad(lambda x: nll_of(x, labels, jnp.ones((1, 3))).sum())(logits)
    assert np.isfinite(grad).all()


def test_a_label_outside_the_vocabulary_is_loud():
    logits, labels, mask = batch(7)
    labels[0, 1] = 7
    assert np.isnan(nll_of(logits, labels, mask)[0])
    labels[0, 1] = -1
    assert np.isnan(nll_of(logits, labels, mask)[0])


def test_wrong_shapes_and_names_are_refused():
    logits, labels, mask = batch()
    with pytest.raises(AssertionError):
        nll_of(logits, labels[:, :-1], mask)
    with pytest.raises(AssertionError):
        nll_of(logits, labels, mask[:, :-1])
    with pytest.raises(ValueError, match="one of mean, sum"):
        nll_of(logits, labels, mask, reduction="example_mean")


def test_vmap_over_a_leading_axis():
    logits, labels, mask = batch(8, shape=(4, 5, 7))
    stacked = jax.vmap(nll_of)(logits[:, None], labels[:, None], mask[:, None])
    np.testing.assert_allclose(stacked[:, 0], nll_of(logits, labels, mask), rtol=1e-6)
