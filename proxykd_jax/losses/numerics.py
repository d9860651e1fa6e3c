"""Arithmetic shared by the losses: float32, safe logarithms, look-ups along the vocabulary."""

import math

import chex
import jax
import jax.numpy as jnp

# Stands in for the log of a probability of exactly zero. Below any log-prob that a softmax gives,
# yet finite: times a probability of zero it is zero, where -inf would give NaN.
LOGP_FLOOR = -1e4
# The same for the log-probs of whole sequences, which add up thousands of tokens.
SEQUENCE_LOGP_FLOOR = -1e8
# Smallest normal float32: the logarithm of a tail mass is taken of no less.
SMALLEST_MASS = 1.2e-38
# 1 - x holds nothing below this in float32.
FLOAT32_EPS = 1.2e-7


def float32(values: chex.ArrayTree) -> jax.Array:
    """The array in float32; every loss computes in it whatever it is given."""
    return jnp.asarray(values, jnp.float32)


def inside(mask: chex.Array) -> jax.Array:
    """A mask of bools, integers or floats as bools: whatever is not zero is inside."""
    return jnp.asarray(mask) != 0


def blank_outside(logits: chex.Array, mask: chex.Array | None) -> jax.Array:
    """Float32 logits with zeros at masked positions.

    Masking the loss alone is not enough: at a position with infinite or NaN logits the zero
    cotangent meets an infinite derivative, and zero times infinity is NaN.

    Args:
        logits: `[..., V]`.
        mask: `[...]`, or None for no masking.
    """
    logits = float32(logits)
    if mask is None:
        return logits
    chex.assert_shape(mask, logits.shape[:-1])
    return jnp.where(inside(mask)[..., None], logits, 0.0)


def blank_tokens(values: chex.Array, mask: chex.Array | None) -> jax.Array:
    """Float32 values, one a token, with zeros at masked positions.

    Args:
        values, mask: of one shape; no masking without a mask.
    """
    values = float32(values)
    if mask is None:
        return values
    chex.assert_equal_shape([values, mask])
    return jnp.where(inside(mask), values, 0.0)


def weigh(values: chex.Array, weights: chex.Array) -> jax.Array:
    """values * weights of one shape, and exactly 0 where the weight is 0: infinite values too."""
    weights = float32(weights)
    chex.assert_shape(values, weights.shape)
    return jnp.where(weights == 0, 0.0, float32(values)) * weights


@jax.custom_jvp
def finite_log(logps: jax.Array, floor: float = LOGP_FLOOR) -> jax.Array:
    """Log-probs with -inf replaced by a finite floor; the derivative is 1 everywhere."""
    return jnp.maximum(logps, floor)


finite_log.defjvps(lambda tangent, _out, _logps, _floor: tangent, None)


def log1mexp(logps: jax.Array) -> jax.Array:
    """log(1 - exp(logps)) for log-probs <= 0, accurate at both ends, finite at 0 and -inf.

    Next to 0 the difference is taken by `expm1`, far from it by `log1p`. A log-prob of 0 is read
    as one float32 step below it, so that the log-odds of a certain event stay finite.
    """
    logps = jnp.minimum(logps, -FLOAT32_EPS)
    near = logps > -0.6931472
    near_logps = jnp.where(near, logps, -0.5)
    far_logps = jnp.where(near, -1.0, logps)
    return jnp.where(near, jnp.log(-jnp.expm1(near_logps)), jnp.log1p(-jnp.exp(far_logps)))


def gather_vocab(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values at some ids of the vocabulary, and which entries of the vocabulary those are.

    Both are batched gathers and scatters along the last axis, 10 times as fast on CPU as
    comparing every id with every entry. A vocabulary axis that is sharded stays so: devices
    exchange `[..., K]` values (a test looks at the compiled program).

    Args:
        values: `[..., V]`.
        ids: `[..., K]` integers.

    Returns:
        `[..., K]` values and `[..., V]` bools.
    """
    ids = ids.astype(jnp.int32)
    nowhere = jnp.zeros(values.shape, bool)
    hit = scatter_vocab(nowhere, ids, jnp.ones(ids.shape, bool), add=False)
    return jnp.take_along_axis(values, ids, axis=-1), hit


def scatter_vocab(
    values: jax.Array, ids: jax.Array, updates: jax.Array, *, add: bool = True
) -> jax.Array:
    """The values with updates added, or put, at some ids of the vocabulary.

    Args:
      values: `[..., V]`.
      ids, updates: `[..., K]`.
      add: else put in place of what is there.
    """

    def change(row: jax.Array, row_ids: jax.Array, row_updates: jax.Array) -> jax.Array:
        at = row.at[row_ids]
        return at.add(row_updates) if add else at.set(row_updates)

    # vmap gives a scatter with batch axes. With explicit indices for all axes, which
    # `put_along_axis` makes, a batch spread over devices would be collected on each.
    for _ in range(ids.ndim - 1):
        change = jax.vmap(change)
    return change(values, ids, updates)


def log_mixture(weight: float, x: jax.Array) -> jax.Array:
    """log(1 - weight + weight e^x), 0 < weight < 1: exact for small weights, finite for all x."""
    large = x > 20.0
    small_x = jnp.where(large, 0.0, x)
    large_x = jnp.where(large, x, 20.0)
    near = jnp.log1p(weight * jnp.expm1(small_x))
    far = large_x + math.log(weight) + jnp.log1p((1 - weight) / weight * jnp.exp(-large_x))
    return jnp.where(large, far, near)
