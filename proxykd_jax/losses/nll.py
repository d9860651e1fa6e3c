"""Negative log-likelihood of the teacher's tokens (eqs. 1, 3 and 7)."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import blank_outside, scatter_vocab
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
    known_BL = (labels_BL >= 0) & (labels_BL < logits_BLV.shape[-1])
    return jnp.where(known_BL, _label_logps(logits_BLV, labels_BL), jnp.nan)


@jax.custom_vjp
def _label_logps(logits_BLV: jax.Array, labels_BL: jax.Array) -> jax.Array:
    return _label_logps_forward(logits_BLV, labels_BL)[0]


def _label_logps_forward(logits_BLV: jax.Array, labels_BL: jax.Array) -> tuple[jax.Array, Any]:
    # Relative to the greatest logit, as log-softmax does: keeps digits where logits are large.
    highest_BL1 = logits_BLV.max(axis=-1, keepdims=True)
    log_sum_BL1 = jnp.log(jnp.exp(logits_BLV - highest_BL1).sum(axis=-1, keepdims=True))
    label_BL1 = jnp.take_along_axis(logits_BLV, labels_BL[..., None], axis=-1, mode="clip")
    logps_BL = (label_BL1 - highest_BL1 - log_sum_BL1)[..., 0]
    return logps_BL, (logits_BLV, labels_BL, highest_BL1, log_sum_BL1)


def _label_logps_backward(residuals: Any, slope_BL: jax.Array) -> tuple[jax.Array, None]:
    """One pass over the vocabulary, -p, and the label's place: taking the look-up and the softmax
    apart makes arrays of the vocabulary's size for each."""
    logits_BLV, labels_BL, highest_BL1, log_sum_BL1 = residuals
    # Not by the difference to the greatest logit once more: XLA would keep that for all entries.
    probs_BLV = jnp.exp(logits_BLV - (highest_BL1 + log_sum_BL1))
    slope_BL1 = slope_BL[..., None]
    return scatter_vocab(-probs_BLV * slope_BL1, labels_BL[..., None], slope_BL1), None


_label_logps.defvjp(_label_logps_forward, _label_logps_backward)


def nll(
    logps_BL: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str = "mean",
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """Negative log-likelihood of the labels inside the mask, one value an example.

    >>> logps_BL = token_logps(logits_BLV, labels_BL, mask_BL)
    >>> nll(logps_BL, mask_BL)                    # nats a token
    >>> nll(logps_BL, mask_BL, reduction="sum")   # -log pi(y|x), nats

    Args:
        logps_BL: log-probs of the labels, from `token_logps`. Outside the mask anything may stand.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.
        segment_ids_BL, num_segments: packed rows, as in `reduce_tokens`.

    Returns:
        `[B]` float32, or `[B, num_segments]` for packed rows; 0 for an empty mask.

    Raises:
        ValueError: unknown reduction, or half of the packing arguments.
    """
    return reduce_tokens(
        -logps_BL,
        mask_BL,
        reduction=reduction,
        segment_ids_BL=segment_ids_BL,
        num_segments=num_segments,
    )
