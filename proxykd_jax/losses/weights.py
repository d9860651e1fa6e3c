"""Sample weights for the student's KL: how well the proxy explains the teacher's answer (eq. 9)."""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import float32, inside


def alignment_weights(
    seq_loglik_B: chex.Array, loglik_mean: chex.Numeric, loglik_std: chex.Numeric
) -> jax.Array:
    """w(x, y) = sigmoid((log pi_p(y|x) - mu) / gamma) (eq. 9).

    The paper uses log-likelihoods summed over tokens. Then w mostly rewards short answers. It does
    not if you divide each log-likelihood by its number of tokens first. Compute mu and gamma from
    the same kind of log-likelihood.

    Args:
        seq_loglik_B: the aligned proxy's log-likelihoods of the teacher's answers, nats.
        loglik_mean: mu, the mean over the whole split, not over a batch.
        loglik_std: gamma, the standard deviation over the same split. If it is 0, all weights are
            0.5.

    Returns:
        `[B]` float32 in [0, 1], about 0.5 on average.
    """
    loglik_B, mean, std = float32(seq_loglik_B), float32(loglik_mean), float32(loglik_std)
    chex.assert_rank([mean, std], 0)
    z_B = (loglik_B - mean) / jnp.where(std == 0, 1.0, std)
    return jnp.where(std == 0, 0.5, jax.nn.sigmoid(jnp.where(std == 0, 0.0, z_B)))


def normalize_weights(
    sample_weight_B: chex.Array,
    weight_mean: chex.Numeric | None = None,
    *,
    example_mask_B: chex.Array | None = None,
) -> jax.Array:
    """Weights divided by their mean. Weights of mean 0.5 would otherwise halve the KL.

    Args:
        sample_weight_B: weights of the whole split, or of a batch if `weight_mean` is given.
        weight_mean: the mean over the whole split; None: the mean of `sample_weight_B`.
        example_mask_B: examples that count in that mean; None: all of them.

    Returns:
        `[B]` float32 with mean 1 over the split; all 0 if the mean is 0.
    """
    weight_B = float32(sample_weight_B)
    if weight_mean is None:
        valid_B = jnp.ones(weight_B.shape, bool)
        if example_mask_B is not None:
            valid_B = inside(example_mask_B)
            chex.assert_shape(valid_B, weight_B.shape)
        count = jnp.maximum(valid_B.sum(dtype=jnp.float32), 1.0)
        mean = jnp.where(valid_B, weight_B, 0.0).sum() / count
    else:
        mean = float32(weight_mean)
        chex.assert_rank(mean, 0)
    return jnp.where(mean == 0, 0.0, weight_B / jnp.where(mean == 0, 1.0, mean))


def length_correlation(
    sample_weight_B: chex.Array,
    tokens_B: chex.Array,
    *,
    example_mask_B: chex.Array | None = None,
) -> jax.Array:
    """Pearson correlation of weights and answer lengths; near -1, weights favour short answers.

    Args:
        sample_weight_B: weights.
        tokens_B: the number of response tokens of the same examples.
        example_mask_B: examples that count; None: all of them.

    Returns:
        Float32 scalar in [-1, 1]; 0 if the weights or the lengths are all equal.
    """
    weight_B, length_B = float32(sample_weight_B), float32(tokens_B)
    chex.assert_equal_shape([weight_B, length_B])
    valid_B = jnp.ones(weight_B.shape, bool)
    if example_mask_B is not None:
        valid_B = inside(example_mask_B)
        chex.assert_shape(valid_B, weight_B.shape)
    weight_B, length_B = _centred(weight_B, valid_B), _centred(length_B, valid_B)
    spread = jnp.sqrt(jnp.square(weight_B).sum() * jnp.square(length_B).sum())
    flat = spread == 0
    return jnp.where(flat, 0.0, (weight_B * length_B).sum() / jnp.where(flat, 1.0, spread))


def _centred(value_B: jax.Array, valid_B: jax.Array) -> jax.Array:
    """Deviations from the mean of the valid examples; 0 for the other examples."""
    count = jnp.maximum(valid_B.sum(dtype=jnp.float32), 1.0)
    mean = jnp.where(valid_B, value_B, 0.0).sum() / count
    return jnp.where(valid_B, value_B - mean, 0.0)
