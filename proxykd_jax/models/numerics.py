"""Precision of matrix products, and the scores of attention before the softmax."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Finite: a row with every slot masked then gives the mean of the values, not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def dot_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 for float32 operands (GPU and TPU would use fewer bits), default otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def masked_scores(scores_BGLQS: jax.Array, head_dim: int, mask_BLS: jax.Array | None) -> jax.Array:
    """Products q k divided by sqrt(C), and a large negative number where the mask is False."""
    scores_BGLQS *= head_dim**-0.5
    if mask_BLS is None:
        return scores_BGLQS
    return jnp.where(mask_BLS[:, None, :, None], scores_BGLQS, _MASKED)
