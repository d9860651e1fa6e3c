"""Arithmetic that the losses share: float32, safe logarithms, look-ups along the vocabulary."""

import math

import chex
import jax
import jax.numpy as jnp

# Replaces the log of a probability of exactly zero. It is below any log-prob that a softmax gives,
# yet finite: zero times this is zero, whereas zero times -inf is NaN.
LOGP_FLOOR = -1e4
# The same for log-probs of whole sequences, which are sums over thousands of tokens.
SEQUENCE_LOGP_FLOOR = -1e8
# The smallest normal float32. A tail mass is raised to this before its logarithm is taken.
SMALLEST_MASS = 1.2e-38
# The resolution of 1 - x in float32.
FLOAT32_EPS = 1.2e-7


def float32(values: chex.ArrayTree) -> jax.Array:
    """The array in float32, the type in which every loss computes."""
    return jnp.asarray(values, jnp.float32)


def inside(mask: chex.Array) -> jax.Array:
    """A mask of bools, integers or floats as bools; nonzero means inside."""
    return jnp.asarray(mask) != 0


def blank_outside(logits: chex.Array, mask: chex.Array | None) -> jax.Array:
    """Float32 logits with zeros at masked positions.

    Masking the loss alone is not enough. At a position with infinite or NaN logits the cotangent is
    zero but the derivative is infinite, and zero times infinity is NaN.

    Args:
        logits: `[..., V]`.
        mask: `[...]`; None: no mask.

    Returns:
        `[..., V]` float32.
    """
    logits = float32(logits)
    if mask is None:
        return logits
    chex.assert_shape(mask, logits.shape[:-1])
    return jnp.where(inside(mask)[..., None], logits, 0.0)


def blank_tokens(values: chex.Array, mask: chex.Array | None) -> jax.Array:
    """Float32 values, one per token, with zeros at masked positions.

    Args:
        values: of any shape.
        mask: the same shape; None: no mask.
    """
    values = float32(values)
    if mask is None:
        return values
    chex.assert_equal_shape([values, mask])
    return jnp.where(inside(mask), values, 0.0)


def weigh(values: chex.Array, weights: chex.Array) -> jax.Array:
    """values * weights, and exactly 0 where the weight is 0, even if the value is infinite.

    Both arrays have the same shape.
    """
    weights = float32(weights)
    chex.assert_shape(values, weights.shape)
    return jnp.where(weights == 0, 0.0, float32(values)) * weights


@jax.custom_jvp
def finite_log(logps: jax.Array, floor: float = LOGP_FLOOR) -> jax.Array:
    """Log-probs raised to at least a finite floor; the derivative is 1 everywhere."""
    return jnp.maximum(logps, floor)


finite_log.defjvps(lambda tangent, _out, _logps, _floor: tangent, None)


def log1mexp(logps: jax.Array) -> jax.Array:
    """log(1 - exp(logps)) for log-probs <= 0: accurate at both ends, finite at 0 and -inf.

    Log-probs near 0 use `expm1`, the others `log1p`. A log-prob of 0 counts as one float32 step
    below 0, so that the log-odds of a certain event stay finite.
    """
    logps = jnp.minimum(logps, -FLOAT32_EPS)
    near = logps > -0.6931472
    near_logps = jnp.where(near, logps, -0.5)
    far_logps = jnp.where(near, -1.0, logps)
    return jnp.where(near, jnp.log(-jnp.expm1(near_logps)), jnp.log1p(-jnp.exp(far_logps)))


def gather_vocab(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values at some ids of the vocabulary, and a mask of the entries at these ids.

    Both use batched gathers and scatters along the last axis. On CPU this is 10 times as fast as
    comparing every id with every entry. A sharded vocabulary axis stays sharded: devices exchange
    only `[..., K]` values, and a test checks this in the compiled program.

    Args:
        values: `[..., V]`.
        ids: `[..., K]` integers.

    Returns:
        The `[..., K]` values, and `[..., V]` bools that are True at the ids.
    """
    ids = ids.astype(jnp.int32)
    nowhere = jnp.zeros(values.shape, bool)
    hit = scatter_vocab(nowhere, ids, jnp.ones(ids.shape, bool), add=False)
    return jnp.take_along_axis(values, ids, axis=-1), hit


def scatter_vocab(
    values: jax.Array, ids: jax.Array, updates: jax.Array, *, add: bool = True
) -> jax.Array:
    """The values with updates at some ids of the vocabulary.

    Args:
        values: `[..., V]`.
        ids, updates: `[..., K]`.
        add: add the updates to the values; if False, replace the values.

    Returns:
        `[..., V]`.
    """

    def change(row: jax.Array, row_ids: jax.Array, row_updates: jax.Array) -> jax.Array:
        at = row.at[row_ids]
        return at.add(row_updates) if add else at.set(row_updates)

    # vmap makes a scatter with batch axes. `put_along_axis` would make one with explicit indices
    # for all axes, and a batch that is sharded over devices would be gathered on each of them.
    for _ in range(ids.ndim - 1):
        change = jax.vmap(change)
    return change(values, ids, updates)


def log_mixture(weight: float, x: jax.Array) -> jax.Array:
    """log(1 - weight + weight e^x): exact for small weights, finite for all x.

    Args:
        weight: a Python number, 0 < weight < 1.
        x: any shape.
    """
    large = x > 20.0
    small_x = jnp.where(large, 0.0, x)
    large_x = jnp.where(large, x, 20.0)
    near = jnp.log1p(weight * jnp.expm1(small_x))
    far = large_x + math.log(weight) + jnp.log1p((1 - weight) / weight * jnp.exp(-large_x))
    return jnp.where(large, far, near)
