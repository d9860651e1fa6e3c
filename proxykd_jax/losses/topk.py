"""KL between a stored top-k of the proxy and the student (eqs. 8 and 10).

The store holds K log-probs of the proxy's full softmax. The option `tail` names what happens to the
probability mass outside these K ids. In the table p is the proxy, q the student, sums run over the
stored ids, and p_T and q_T are the masses outside them:

| tail                | value                                  | gradient                          |
|---------------------|----------------------------------------|-----------------------------------|
| `bucket`            | sum p log(p/q) + p_T log(p_T/q_T)      | closest to that of the full KL    |
| `renormalize`       | KL of both, each renormalised over ids | none outside the ids              |
| `renormalize_proxy` | KL of p / sum p against q              | pushes q outside the ids to 0     |
| `zero`              | sum p log(p/q), can be negative        | `renormalize_proxy` times sum p   |

All four are equal if K is the size of the vocabulary.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.divergence import kl_terms
from proxykd_jax.losses.numerics import (
    FLOAT32_EPS,
    SMALLEST_MASS,
    blank_outside,
    blank_tokens,
    finite_log,
    float32,
    gather_vocab,
    scatter_vocab,
    weigh,
)
from proxykd_jax.losses.reduction import reduce_tokens

TAILS = ("bucket", "renormalize", "renormalize_proxy", "zero")


def topk_logps(
    logits_BLV: chex.Array,
    ids_BLK: chex.Array,
    mask_BL: chex.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of the full softmax at some ids, and the log of the mass outside them.

    >>> topk_BLK, tail_BL = topk_logps(logits_BLV, ids_BLK)

    The tail mass is the sum over the entries outside the ids. Computing it as 1 - sum would lose
    all precision for a confident model, and its gradient would be a difference of large numbers.

    Args:
        logits_BLV: any float type and any leading axes.
        ids_BLK: signed or unsigned integers. An id that occurs twice counts once.
        mask_BL: positions outside the mask are computed from zeros. None: no mask.

    Returns:
        `[B, L, K]` log-probs and `[B, L]` log tail mass, float32, nats. The tail mass is at least
        1.2e-38, even if the tail is empty.
    """
    logits_BLV = blank_outside(logits_BLV, mask_BL)
    nowhere_BL0 = jnp.zeros((*logits_BLV.shape[:-1], 0), jnp.int32)
    found_BLK, _, tail_BL = _logps_at(logits_BLV, _checked(ids_BLK, logits_BLV), nowhere_BL0)
    return found_BLK, tail_BL


def topk_and_label_logps(
    logits_BLV: chex.Array, ids_BLK: chex.Array, labels_BL: chex.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`topk_logps` and `token_logps` of the same logits, with one backward pass for both.

    Args:
        logits_BLV, ids_BLK: as in `topk_logps`.
        labels_BL: as in `token_logps`; a label may be one of the ids or not.

    Returns:
        Three float32 arrays in nats: `[B, L, K]` log-probs at the ids, `[B, L]` log tail mass, and
        `[B, L]` log-probs of the labels.
    """
    logits_BLV = float32(logits_BLV)
    labels_BL = jnp.asarray(labels_BL)
    chex.assert_shape(labels_BL, logits_BLV.shape[:-1])
    known_BL = (labels_BL >= 0) & (labels_BL < logits_BLV.shape[-1])
    label_BL1 = jnp.where(known_BL, labels_BL, 0).astype(jnp.int32)[..., None]
    found_BLK, label_logps_BL1, tail_BL = _logps_at(
        logits_BLV, _checked(ids_BLK, logits_BLV), label_BL1
    )
    return found_BLK, tail_BL, jnp.where(known_BL, label_logps_BL1[..., 0], jnp.nan)


def _checked(ids_BLK: chex.Array, logits_BLV: jax.Array) -> jax.Array:
    ids_BLK = jnp.asarray(ids_BLK)
    chex.assert_equal_rank([logits_BLV, ids_BLK])
    chex.assert_equal_shape_prefix([logits_BLV, ids_BLK], logits_BLV.ndim - 1)
    return ids_BLK.astype(jnp.int32)


@jax.custom_vjp
def _logps_at(
    logits_BLV: jax.Array, ids_BLK: jax.Array, others_BLJ: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probs at the ids and at the others, and the log of the mass outside the ids.

    The forward pass reads the vocabulary twice and the backward pass once. JAX's own derivative
    would keep more arrays of the vocabulary's size, and takes half as long again on a CPU.
    """
    return _logps_at_forward(logits_BLV, ids_BLK, others_BLJ)[0]


def _logps_at_forward(logits_BLV: jax.Array, ids_BLK: jax.Array, others_BLJ: jax.Array) -> Any:
    highest_BL1 = logits_BLV.max(axis=-1, keepdims=True)
    found_BLK, hit_BLV = gather_vocab(logits_BLV, ids_BLK)
    others_logits_BLJ = jnp.take_along_axis(logits_BLV, others_BLJ, axis=-1)
    # Multiply by 0 or 1: on a CPU the sum of a `where` takes three times as long.
    tail_BL = (jnp.exp(logits_BLV - highest_BL1) * ~hit_BLV).sum(axis=-1)
    times_BLK = (ids_BLK[..., :, None] == ids_BLK[..., None, :]).sum(axis=-1)
    head_BL = (jnp.exp(found_BLK - highest_BL1) / times_BLK).sum(axis=-1)
    # Subtract the greatest logit, as log-softmax does, so that large logits lose no precision.
    log_sum_BL1 = jnp.log(head_BL + tail_BL)[..., None]
    logps_BLK, others_logps_BLJ = (
        logits - highest_BL1 - log_sum_BL1 for logits in (found_BLK, others_logits_BLJ)
    )
    tail_logps_BL = jnp.log(jnp.maximum(tail_BL, SMALLEST_MASS)) - log_sum_BL1[..., 0]
    residuals = (logits_BLV, ids_BLK, others_BLJ, highest_BL1, log_sum_BL1)
    return (logps_BLK, others_logps_BLJ, tail_logps_BL), (*residuals, logps_BLK, tail_logps_BL)


def _logps_at_backward(residuals: Any, cotangents: Any) -> tuple[jax.Array, None, None]:
    logits_BLV, ids_BLK, others_BLJ, highest_BL1, log_sum_BL1, found_BLK, tail_logps_BL = residuals
    of_found_BLK, of_others_BLJ, of_tail_BL = cotangents
    of_all_BL1 = (of_found_BLK.sum(axis=-1) + of_others_BLJ.sum(axis=-1) + of_tail_BL)[..., None]
    # Do not write `logits - highest` again here: XLA would reuse the forward pass's array and keep
    # it in memory for the whole vocabulary.
    logps_BLV = logits_BLV - (highest_BL1 + log_sum_BL1)
    grads_BLV = (
        jnp.exp(logps_BLV - tail_logps_BL[..., None]) * of_tail_BL[..., None]
        - jnp.exp(logps_BLV) * of_all_BL1
    )
    # The tail has no part at the ids, so the entries there are replaced. This comes before the
    # additions, because an id may occur twice.
    grads_BLV = scatter_vocab(grads_BLV, ids_BLK, -jnp.exp(found_BLK) * of_all_BL1, add=False)
    grads_BLV = scatter_vocab(grads_BLV, ids_BLK, of_found_BLK)
    return scatter_vocab(grads_BLV, others_BLJ, of_others_BLJ), None, None


_logps_at.defvjp(_logps_at_forward, _logps_at_backward)


def topk_kl_tokens(
    student: tuple[chex.Array, chex.Array | None],
    proxy: tuple[chex.Array, chex.Array | None],
    mask_BL: chex.Array | None = None,
    *,
    tail: str = "bucket",
) -> jax.Array:
    """Top-k KL(proxy || student) at each position (eq. 8).

    >>> student = topk_logps(student_logits_BLV, ids_BLK, mask_BL)
    >>> proxy = topk_logps(proxy_logits_BLV, ids_BLK)
    >>> topk_kl_tokens(student, proxy, mask_BL)

    Args:
        student: the pair that `topk_logps` returns for the student at the stored ids: `[B, L, K]`
            log-probs of its full softmax, and `[B, L]` log of the mass outside the ids. If the
            second is None, the mass is 1 - sum q, but at least 1.2e-7, the resolution of float32;
            at that bound it has no gradient. Give the mass if you can.
        proxy: the same pair for the proxy, as it was stored; -inf for no mass outside. If the
            second is None, the mass is 1 - sum p, or 0 where rounding makes that negative. The
            proxy is not treated as a constant.
        mask_BL: positions outside the mask are computed from zeros, whatever they hold. None: no
            mask.
        tail: `bucket`, `renormalize`, `renormalize_proxy` or `zero`. The last three ignore the
            masses outside the ids.

    Returns:
        `[B, L]` float32 in nats, with finite gradients. Other leading axes work too.

    Raises:
        ValueError: the tail is unknown.
    """
    if tail not in TAILS:
        raise ValueError(
            f"tail is {tail!r}; the treatment of the mass outside the top k is one of "
            f"{', '.join(TAILS)}."
        )
    (student_BLK, student_tail_BL), (proxy_BLK, proxy_tail_BL) = student, proxy
    student_BLK, proxy_BLK = blank_outside(student_BLK, mask_BL), blank_outside(proxy_BLK, mask_BL)
    chex.assert_equal_shape([student_BLK, proxy_BLK])
    if tail in ("renormalize", "renormalize_proxy"):
        proxy_BLK = _renormalize(proxy_BLK)
    if tail == "renormalize":
        student_BLK = _renormalize(student_BLK)
    head_BL = kl_terms(proxy_BLK, student_BLK).sum(axis=-1)
    if tail != "bucket":
        return head_BL

    if proxy_tail_BL is None:
        proxy_tail_BL = _log_of_rest(proxy_BLK, least=0.0)
    if student_tail_BL is None:
        student_tail_BL = _log_of_rest(student_BLK, least=FLOAT32_EPS)
    proxy_tail_BL = blank_tokens(proxy_tail_BL, mask_BL)
    student_tail_BL = blank_tokens(student_tail_BL, mask_BL)
    chex.assert_shape([proxy_tail_BL, student_tail_BL], head_BL.shape)
    return head_BL + kl_terms(proxy_tail_BL, student_tail_BL)


def topk_kl(
    student: tuple[chex.Array, chex.Array | None],
    proxy: tuple[chex.Array, chex.Array | None],
    mask_BL: chex.Array,
    *,
    tail: str = "bucket",
    reduction: str = "mean",
    segment_ids_BL: chex.Array | None = None,
    num_segments: int | None = None,
) -> jax.Array:
    """Top-k KL(proxy || student), one value per example (eq. 8).

    Args:
        student, proxy, tail: as in `topk_kl_tokens`.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.
        segment_ids_BL, num_segments: packed rows, as in `reduce_tokens`.

    Returns:
        `[B]` float32 in nats, or `[B, num_segments]` for packed rows; 0 for an empty mask.

    Raises:
        ValueError: the tail or the reduction is unknown, or only one of the packing arguments is
            given.
    """
    return reduce_tokens(
        topk_kl_tokens(student, proxy, mask_BL, tail=tail),
        mask_BL,
        reduction=reduction,
        segment_ids_BL=segment_ids_BL,
        num_segments=num_segments,
    )


def weighted_kl(kl_B: chex.Array, sample_weight_B: chex.Array) -> jax.Array:
    """w(x, y) KL, not reduced over the batch (eq. 10).

    >>> weight_B = normalize_weights(alignment_weights(seq_loglik_B, loglik_mean, loglik_std))
    >>> weighted_kl(topk_kl(student, proxy, mask_BL), weight_B)

    Args:
        kl_B: the KL of each example in nats, from `topk_kl`; `[B, S]` for packed rows.
        sample_weight_B: the same shape; see `alignment_weights`. An example with weight 0 gives 0,
            whatever its KL.

    Returns:
        Float32 of the same shape, nats.
    """
    return weigh(kl_B, sample_weight_B)


def _renormalize(logps: jax.Array) -> jax.Array:
    """Log-probs normalised over the ids alone; -inf stays -inf, and no value becomes NaN."""
    return logps - jax.nn.logsumexp(finite_log(logps), axis=-1, keepdims=True)


def _log_of_rest(logps: jax.Array, *, least: float) -> jax.Array:
    """log(1 - sum of probabilities), where the difference is raised to `least`; 0 gives -inf."""
    rest = 1.0 - jnp.exp(logps).sum(axis=-1)
    some = rest > least
    floor = jnp.log(jnp.float32(least)) if least else -jnp.inf
    return jnp.where(some, jnp.log(jnp.where(some, rest, 1.0)), floor)
