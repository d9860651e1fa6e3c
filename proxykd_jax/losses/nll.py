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

    A vocabulary axis that is sharded stays sharded; a test checks the compiled program.
    Args:
        logits_BLV: any float type and any leading axes; computed in float32.
        labels_BL: integers. The label at position t belongs to the logits at position t. A label
            outside the vocabulary gives NaN, which does no harm outside the loss mask.
        mask_BL: positions outside the mask are computed from zeros, so that neither their value
            nor their gradient is NaN. Finite logits need no mask.

    Returns:
        `[B, L]` float32 in nats, <= 0.
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
    # Subtract the greatest logit, as log-softmax does, so that large logits lose no precision.
    highest_BL1 = logits_BLV.max(axis=-1, keepdims=True)
    log_sum_BL1 = jnp.log(jnp.exp(logits_BLV - highest_BL1).sum(axis=-1, keepdims=True))
    label_BL1 = jnp.take_along_axis(logits_BLV, labels_BL[..., None], axis=-1, mode="clip")
    logps_BL = (label_BL1 - highest_BL1 - log_sum_BL1)[..., 0]
    return logps_BL, (logits_BLV, labels_BL, highest_BL1, log_sum_BL1)


def _label_logps_backward(residuals: Any, slope_BL: jax.Array) -> tuple[jax.Array, None]:
    """The gradient: -p over the vocabulary, in one pass, plus 1 at the label.

    JAX's own derivatives of the look-up and of the softmax would make one array of the vocabulary's
    size each.
    """
    logits_BLV, labels_BL, highest_BL1, log_sum_BL1 = residuals
    # Do not write `logits - highest` again here: XLA would reuse the forward pass's array and keep
    # it in memory for the whole vocabulary.
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
    """Negative log-likelihood of the labels inside the mask, one value per example.

    >>> logps_BL = token_logps(logits_BLV, labels_BL, mask_BL)
    >>> nll(logps_BL, mask_BL)                    # nats per token
    >>> nll(logps_BL, mask_BL, reduction="sum")   # -log pi(y|x), nats

    Args:
        logps_BL: log-probs of the labels, from `token_logps`. Values outside the mask are ignored,
            NaN too.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.
        segment_ids_BL, num_segments: packed rows, as in `reduce_tokens`.

    Returns:
        `[B]` float32, or `[B, num_segments]` for packed rows; 0 for an empty mask.

    Raises:
        ValueError: the reduction is unknown, or only one of the packing arguments is given.
    """
    return reduce_tokens(
        -logps_BL,
        mask_BL,
        reduction=reduction,
        segment_ids_BL=segment_ids_BL,
        num_segments=num_segments,
    )
