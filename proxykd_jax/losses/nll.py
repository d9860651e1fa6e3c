"""Negative log-likelihood of the teacher's tokens (eqs. 1, 3 and 7)."""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import blank_outside
from proxykd_jax.losses.reduction import reduce_tokens


def token_logps(
    logits_BLV: chex.Array, labels_BL: chex.Array, mask_BL: chex.Array | None = None
) -> jax.Array:
    """Log-probability of each label under the softmax of its logits.

    The label is found by comparing with the vocabulary's positions instead of by a gather, so a
    vocabulary axis that is sharded stays so.

    Args:
        logits_BLV: any float type; computed in float32. Any leading axes will do.
        labels_BL: integers, position t speaking of the same token as the logits at t. A label
            outside the vocabulary gives NaN; under the mask it does no harm.
        mask_BL: where given, positions outside it are computed from zeros, so that neither their
            value nor their gradient can be NaN. Not needed for finite logits.

    Returns:
        `[B, L]` float32, <= 0.
    """
    logits_BLV = blank_outside(logits_BLV, mask_BL)
    labels_BL = jnp.asarray(labels_BL)
    chex.assert_shape(labels_BL, logits_BLV.shape[:-1])
    # Relative to the greatest logit, as log-softmax does: keeps digits where logits are large.
    logits_BLV = logits_BLV - jax.lax.stop_gradient(logits_BLV.max(axis=-1, keepdims=True))
    iota_BLV = jax.lax.broadcasted_iota(jnp.int32, logits_BLV.shape, logits_BLV.ndim - 1)
    is_label_BLV = iota_BLV == labels_BL[..., None]
    label_logits_BL = jnp.where(is_label_BLV, logits_BLV, 0.0).sum(axis=-1)
    logps_BL = label_logits_BL - jnp.log(jnp.exp(logits_BLV).sum(axis=-1))
    known_BL = (labels_BL >= 0) & (labels_BL < logits_BLV.shape[-1])
    return jnp.where(known_BL, logps_BL, jnp.nan)


def nll(
    logits_BLV: chex.Array, labels_BL: chex.Array, mask_BL: chex.Array, *, reduction: str = "mean"
) -> jax.Array:
    """Negative log-likelihood of the labels inside the mask, one value an example.

    >>> nll(logits_BLV, labels_BL, mask_BL)                    # nats a token
    >>> nll(logits_BLV, labels_BL, mask_BL, reduction="sum")   # -log pi(y|x), nats

    Args:
        logits_BLV: any float type.
        labels_BL: integers, aligned with the logits.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.

    Returns:
        `[B]` float32; 0 for an empty mask.

    Raises:
        ValueError: unknown reduction.
    """
    chex.assert_rank(logits_BLV, 3)
    chex.assert_shape(mask_BL, logits_BLV.shape[:-1])
    return reduce_tokens(-token_logps(logits_BLV, labels_BL, mask_BL), mask_BL, reduction=reduction)
