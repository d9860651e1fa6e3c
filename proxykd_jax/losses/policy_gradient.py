"""Losses on the student's own samples: MiniLLM, on-policy distillation, GAD.

p is the scorer, q the student, y_t a sampled token. There is no gradient through sampling, and
none to what was fixed when the sample was drawn: log-probs of that time, advantages, importance
weights, the scorer. The student's log-probs must be those of the policy that drew the tokens, so
samples come at temperature 1 and top-p 1.
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
    """log m, m = a p + (1 - a) q: what MiniLLM samples from (arXiv 2306.08543, section 2.2).

    Args:
        scorer_logps: log-probs under p, of any shape: of the vocabulary to draw from, or of the
            tokens that were drawn.
        student_logps: the same shape under q.
        scorer_share: a, 0 to 1; the paper's is 0.2.

    Returns:
        Float32 of the same shape, without gradient.

    Raises:
        ValueError: scorer_share outside [0, 1].
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
    """w_t = q(y_t) / m(y_t) for tokens drawn from m = a p + (1 - a) q, at most 1 / (1 - a).

    The exact weight of a token is the product of those up to it; MiniLLM keeps the last factor
    alone, for its variance.

    Args:
        scorer_logps_BL, student_logps_BL: log-probs of the tokens at sampling time.
        mask_BL: where given, positions outside it give 1.
        scorer_share: a, 0 to below 1.

    Returns:
        `[B, L]` float32, without gradient.

    Raises:
        ValueError: scorer_share outside [0, 1).
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

    PPO's clipped surrogate (arXiv 1707.06347, eq. 7) to be minimised; without `clip` it is the
    importance-sampled policy gradient -A rho. MiniLLM's weight w is part of what is clipped: as it
    can reach 1 / (1 - a) = 1.25, tokens that p finds impossible are clipped at 0.2 before the
    first update.

    Args:
        logps_BL: log q(y_t) of the student being trained; the only input with a gradient.
        old_logps_BL: the same when the tokens were drawn.
        advantages: `[B, L]`, or `[B]` for one value a response (GRPO, GAD).
        mask_BL: where given, positions outside it give 0.
        clip: > 0 (MiniLLM and GAD 0.2), or None.
        importance_weights_BL: w of `mixture_weights`, 1 without it.

    Returns:
        `[B, L]` float32. A token of advantage 0 gives exactly 0, a clipped one has gradient 0;
        for the others rho overflows where q is e^88 times q_old.

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

    # The log-ratio is replaced before exp where it must not count: a cotangent of zero times an
    # overflown exponential would be NaN.
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
    """w_t KL(q_t || p_t): the part of MiniLLM's gradient that needs no sampled reward.

    Its gradient is exactly that of a token's own reward. Beside it the policy gradient takes
    R_{t+1} (`rewards_to_go(..., include_current=False)`); R_t would count r_t twice.

    Args:
        scorer_logits_BLV, student_logits_BLV, mask_BL: as in `reverse_kl_tokens`; the scorer's
            are constant here.
        importance_weights_BL: w of `mixture_weights`, as in the paper. The authors' code leaves
            it out.

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

    In expectation over the student's tokens its gradient is coef times that of KL(q || p) at each
    position, and so is its value before the first update. Where both models' logits are at hand,
    `reverse_kl_tokens` on the same samples says the same with less variance. Source: Thinking
    Machines' tinker-cookbook, `distillation/train_on_policy.py`: coefficient 1, no discount, no
    clipping. The rewards are neither centred nor whitened: that would change their zero.

    Args:
        logps_BL, old_logps_BL, mask_BL, clip: as in `policy_gradient_tokens`.
        scorer_logps_BL: log p(y_t), nats.
        coef: > 0.

    Returns:
        `[B, L]` float32; gradient to `logps_BL` alone.

    Raises:
        ValueError: coef or clip is not positive.
    """
    advantage_BL = log_ratio_rewards(scorer_logps_BL, old_logps_BL, mask_BL, scale=coef)
    return policy_gradient_tokens(logps_BL, old_logps_BL, advantage_BL, mask_BL, clip=clip)


def low_variance_kl_tokens(
    logps_BL: chex.Array, reference_logps_BL: chex.Array, mask_BL: chex.Array | None = None
) -> jax.Array:
    """exp(d) - d - 1, d = log reference(y_t) - log q(y_t), at each token of the student's samples.

    Never negative, and unbiased for KL(q || reference) in value (Schulman's third estimator).
    GAD keeps the student near its warmed-up self with it, at coefficient 0.001.

    Args:
        logps_BL: log q(y_t) of the student being trained.
        reference_logps_BL: the same under the reference; constant.
        mask_BL: where given, positions outside it give 0.

    Returns:
        `[B, L]` float32; +inf where the reference has e^88 times the student's probability.
    """
    chex.assert_equal_shape([logps_BL, reference_logps_BL])
    reference_BL = jax.lax.stop_gradient(finite_log(blank_tokens(reference_logps_BL, mask_BL)))
    d_BL = reference_BL - finite_log(blank_tokens(logps_BL, mask_BL))
    return jnp.expm1(d_BL) - d_BL
