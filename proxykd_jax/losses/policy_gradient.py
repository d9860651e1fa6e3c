"""Losses on the student's own samples: MiniLLM, on-policy distillation, GAD.

p is the scorer, q the student, y_t a sampled token. The gradient flows only into the log-probs or
logits of the student being trained. It does not flow through sampling, nor into what was fixed when
the sample was drawn: the log-probs at that time, advantages, importance weights, the scorer. The
student's log-probs must be those of the policy that drew the tokens, so samples must be drawn at
temperature 1 and top-p 1.
"""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.advantages import log_ratio_rewards
from proxykd_jax.losses.divergence import reverse_kl_tokens
from proxykd_jax.losses.numerics import blank_tokens, finite_log, float32, log_mixture, weigh


def mixture_logps(
    scorer_logps: chex.Array, student_logps: chex.Array, *, scorer_share: float
) -> jax.Array:
    """log m with m = a p + (1 - a) q, MiniLLM's sampling mixture (arXiv 2306.08543, section 2.2).

    Args:
        scorer_logps: log-probs under p, nats, of any shape. They may belong to the vocabulary to
            draw from, or to tokens that were drawn.
        student_logps: log-probs under q, the same shape.
        scorer_share: a, 0 to 1; 0.2 in the paper.

    Returns:
        Float32 of the same shape, without gradient.

    Raises:
        ValueError: scorer_share is outside [0, 1].
    """
    if not 0 <= scorer_share <= 1:
        raise ValueError(f"scorer_share is {scorer_share}; it takes 0 (student) to 1 (scorer).")
    scorer_logps, student_logps = float32(scorer_logps), float32(student_logps)
    chex.assert_equal_shape([scorer_logps, student_logps])
    share = jnp.log(float32([scorer_share, 1 - scorer_share]))
    return jax.lax.stop_gradient(jnp.logaddexp(share[0] + scorer_logps, share[1] + student_logps))


def mixture_weights(
    scorer_logps_BL: chex.Array,
    student_logps_BL: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    scorer_share: float,
) -> jax.Array:
    """Importance weights w_t = q(y_t) / m(y_t) of tokens drawn from m = a p + (1 - a) q.

    The exact weight of a token is the product of w up to this token. MiniLLM (arXiv 2306.08543,
    section 2.2) keeps only the last factor, because the product has a large variance.

    Args:
        scorer_logps_BL, student_logps_BL: log-probs of the tokens at sampling time, nats.
        mask_BL: positions outside the mask give 1. None: no mask.
        scorer_share: a, at least 0 and below 1.

    Returns:
        `[B, L]` float32, at most 1 / (1 - a), without gradient.

    Raises:
        ValueError: scorer_share is outside [0, 1).
    """
    if not 0 <= scorer_share < 1:
        raise ValueError(
            f"scorer_share is {scorer_share}; it takes 0 to below 1: the student must have a part "
            "in the samples that it is trained on."
        )
    log_ratio_BL = log_ratio_rewards(scorer_logps_BL, student_logps_BL, mask_BL)
    if scorer_share == 0:
        return jnp.ones_like(log_ratio_BL)
    return jnp.exp(-log_mixture(scorer_share, log_ratio_BL))


def policy_gradient_tokens(
    logps_BL: chex.Array,
    old_logps_BL: chex.Array,
    advantages: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    clip: float | None = None,
    importance_weights_BL: chex.Array | None = None,
) -> jax.Array:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)), rho = w q(y_t) / q_old(y_t), each token.

    This is PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with the sign of a loss. Without
    `clip` it is the importance-sampled policy gradient -A rho. MiniLLM's weight w is inside the
    clip. Since w can reach 1 / (1 - a) = 1.25, a clip of 0.2 already applies before the first
    update to tokens that p finds impossible.

    Args:
        logps_BL: log q(y_t) of the student being trained, nats; the only input with a gradient.
        old_logps_BL: log q(y_t) of the student when the tokens were drawn, nats.
        advantages: A, `[B, L]`, or `[B]` for one value per response (GRPO, GAD).
        mask_BL: positions outside the mask give 0. None: no mask.
        clip: > 0 (0.2 in MiniLLM and GAD); None: no clipping.
        importance_weights_BL: w from `mixture_weights`; None: 1.

    Returns:
        `[B, L]` float32. A token with advantage 0 gives exactly 0, and a clipped token has
        gradient 0. For the other tokens rho overflows where q is e^88 times q_old.

    Raises:
        ValueError: clip is not positive.
    """
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is {clip}; it must be above 0, or None for no clipping.")
    advantages = float32(advantages)
    if advantages.ndim == jnp.ndim(logps_BL) - 1:
        advantages = jnp.broadcast_to(advantages[..., None], jnp.shape(logps_BL))
    chex.assert_equal_shape([logps_BL, old_logps_BL, advantages])
    advantage_BL = jax.lax.stop_gradient(blank_tokens(advantages, mask_BL))
    old_BL = jax.lax.stop_gradient(finite_log(blank_tokens(old_logps_BL, mask_BL)))
    log_ratio_BL = finite_log(blank_tokens(logps_BL, mask_BL)) - old_BL
    weight_BL = jnp.ones_like(advantage_BL)
    if importance_weights_BL is not None:
        weight_BL = jax.lax.stop_gradient(blank_tokens(importance_weights_BL, mask_BL))

    # Where the log-ratio must not count it is replaced before exp. Otherwise the backward pass
    # could multiply a zero cotangent by an overflowed exponential, which is NaN.
    if clip is None:
        log_ratio_BL = jnp.where(advantage_BL == 0, 0.0, log_ratio_BL)
        return -advantage_BL * weight_BL * jnp.exp(log_ratio_BL)
    rho_BL = jax.lax.stop_gradient(weight_BL * jnp.exp(log_ratio_BL))
    up_BL = advantage_BL > 0
    beyond_BL = jnp.where(up_BL, rho_BL > 1 + clip, rho_BL < 1 - clip) | (advantage_BL == 0)
    rho_BL = weight_BL * jnp.exp(jnp.where(beyond_BL, 0.0, log_ratio_BL))
    return -advantage_BL * jnp.where(beyond_BL, jnp.where(up_BL, 1 + clip, 1 - clip), rho_BL)


def single_step_kl_tokens(
    scorer_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    importance_weights_BL: chex.Array | None = None,
) -> jax.Array:
    """w_t KL(q_t || p_t): the part of MiniLLM's loss that needs no sampled reward.

    Its gradient is exactly the expected gradient of a token's own reward r_t (arXiv 2306.08543,
    section 2.2). Combine it with a policy gradient on R_{t+1}
    (`rewards_to_go(..., include_current=False)`); with R_t the reward r_t would count twice.

    Args:
        scorer_logits_BLV, student_logits_BLV, mask_BL: as in `reverse_kl_tokens`. The scorer's
            logits are constant here.
        importance_weights_BL: w from `mixture_weights`, as in the paper. None: 1, as in the
            authors' code.

    Returns:
        `[B, L]` float32 in nats, 0 outside the mask.
    """
    scorer_logits_BLV = jax.lax.stop_gradient(scorer_logits_BLV)
    kl_BL = reverse_kl_tokens(scorer_logits_BLV, student_logits_BLV, mask_BL)
    if importance_weights_BL is None:
        return kl_BL
    weight_BL = jax.lax.stop_gradient(blank_tokens(importance_weights_BL, mask_BL))
    return weigh(kl_BL, weight_BL)


def sampled_reverse_kl_tokens(
    logps_BL: chex.Array,
    old_logps_BL: chex.Array,
    scorer_logps_BL: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    coef: float = 1.0,
    clip: float | None = None,
) -> jax.Array:
    """-A_t q(y_t) / q_old(y_t), A_t = -coef (log q_old - log p)(y_t): on-policy distillation.

    In expectation over the student's tokens, its gradient is coef times the gradient of KL(q || p)
    at each position. Before the first update the same holds for its value. If the logits of both
    models are available, `reverse_kl_tokens` on the same samples has the same expectation and less
    variance. The rewards are neither centred nor whitened, because that would shift their zero.

    Source: Thinking Machines' tinker-cookbook, `distillation/train_on_policy.py`, with coefficient
    1, no discount and no clipping.

    Args:
        logps_BL, old_logps_BL, mask_BL, clip: as in `policy_gradient_tokens`.
        scorer_logps_BL: log p(y_t), nats.
        coef: > 0.

    Returns:
        `[B, L]` float32. Only `logps_BL` has a gradient.

    Raises:
        ValueError: coef or clip is not positive.
    """
    advantage_BL = log_ratio_rewards(scorer_logps_BL, old_logps_BL, mask_BL, scale=coef)
    return policy_gradient_tokens(logps_BL, old_logps_BL, advantage_BL, mask_BL, clip=clip)


def low_variance_kl_tokens(
    logps_BL: chex.Array, reference_logps_BL: chex.Array, mask_BL: chex.Array | None = None
) -> jax.Array:
    """exp(d) - d - 1, d = log reference(y_t) - log q(y_t), at each token of the student's samples.

    The value is never negative, and the mean of the value is KL(q || reference) (Schulman's third
    estimator). GAD uses it with coefficient 0.001, to keep the student near its state after the
    warm-up.

    Args:
        logps_BL: log q(y_t) of the student being trained, nats.
        reference_logps_BL: log-probs of the same tokens under the reference, nats; constant.
        mask_BL: positions outside the mask give 0. None: no mask.

    Returns:
        `[B, L]` float32; +inf where the reference has e^88 times the student's probability.
    """
    chex.assert_equal_shape([logps_BL, reference_logps_BL])
    reference_BL = jax.lax.stop_gradient(finite_log(blank_tokens(reference_logps_BL, mask_BL)))
    d_BL = reference_BL - finite_log(blank_tokens(logps_BL, mask_BL))
    return jnp.expm1(d_BL) - d_BL
