"""Rewards of sampled tokens, their returns, and advantages: normalised rewards.

No function here has a gradient: every result is passed through `stop_gradient`. A row holds one
response, because a return sums the rewards of a row's tokens inside the mask, in order. Packed rows
are therefore not supported.
"""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import blank_tokens, finite_log, float32, inside


def log_ratio_rewards(
    scorer_logps_BL: chex.Array,
    student_logps_BL: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    scale: float = 1.0,
    clip: float | None = None,
) -> jax.Array:
    """r_t = scale (log p(y_t) - log q(y_t)), then clipped to [-clip, clip].

    p is the scorer and q the student. The mean of r_t over the student's own tokens is -scale times
    the reverse KL. In MiniLLM's paper (arXiv 2306.08543, section 2.2) scale is 1 and nothing is
    clipped. MiniLLM's code divides by 0.5 (`scale=2`) and clips at 100. On-policy distillation uses
    r_t as the advantage, with its coefficient as `scale`.

    Args:
        scorer_logps_BL: log-probs of the sampled tokens under the scorer, nats.
        student_logps_BL: log-probs of the same tokens under the student that drew them, nats.
        mask_BL: positions outside the mask give 0; None: no mask.
        scale: > 0.
        clip: the greatest absolute value of a reward, > 0; None: no clipping.

    Returns:
        `[B, L]` float32, without gradient. A log-prob of -inf counts as -1e4.

    Raises:
        ValueError: scale or clip is not positive.
    """
    for name, number in (("scale", scale), ("clip", clip)):
        if number is not None and not number > 0:
            raise ValueError(f"{name} is {number}; it must be above 0.")
    chex.assert_equal_shape([scorer_logps_BL, student_logps_BL])
    scorer_BL = finite_log(blank_tokens(scorer_logps_BL, mask_BL))
    student_BL = finite_log(blank_tokens(student_logps_BL, mask_BL))
    reward_BL = scale * (scorer_BL - student_BL)
    if clip is not None:
        reward_BL = jnp.clip(reward_BL, -clip, clip)
    return jax.lax.stop_gradient(reward_BL)


def rewards_to_go(
    rewards_BL: chex.Array,
    mask_BL: chex.Array,
    *,
    include_current: bool,
    discount: float = 1.0,
    length_normalize: bool = True,
) -> jax.Array:
    """The return of each token: the discounted sum of the rewards from it, or from the next token.

    R_t = sum_{t' >= t} discount^(t' - t) r_t', over T response tokens. A token's own reward is in
    R_t; it is not in R_{t+1}.

    | `include_current` | normalised value  | used by                                         |
    |-------------------|-------------------|-------------------------------------------------|
    | False             | R_{t+1} / (T - t) | MiniLLM's paper, which adds a single-step term  |
    | True              | R_t / (T - t + 1) | MiniLLM's code; with that term r_t counts twice |

    The divisor is the number of terms in the sum, whatever the discount. MiniLLM's paper prints
    T - t - 1. That is one too few, and 0 for the last token but one.

    Args:
        rewards_BL: one reward per token.
        mask_BL: response tokens. Tokens outside the mask are skipped, and a gap adds no discount.
        include_current: whether a token's own reward is in its return.
        discount: 0 to 1.
        length_normalize: divide by the number of terms.

    Returns:
        `[B, L]` float32, without gradient. The value is 0 outside the mask, and also at the last
        token if `include_current` is False.

    Raises:
        ValueError: discount is outside [0, 1].
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount is {discount}; it takes 0 to 1.")
    mask_BL = inside(mask_BL)
    chex.assert_rank(mask_BL, 2)
    rewards_BL = blank_tokens(rewards_BL, mask_BL)

    def join(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Joins two runs of tokens: the product of their discounts, the first token's return."""
        return later[0] * earlier[0], earlier[1] + earlier[0] * later[1]

    discount_BL = jnp.where(mask_BL, float32(discount), 1.0)
    _, return_BL = jax.lax.associative_scan(join, (discount_BL, rewards_BL), reverse=True, axis=1)
    terms_BL = jnp.cumsum(mask_BL[:, ::-1], axis=1, dtype=jnp.float32)[:, ::-1]
    if not include_current:
        return_BL, terms_BL = (
            jnp.pad(x_BL[:, 1:], ((0, 0), (0, 1))) for x_BL in (return_BL, terms_BL)
        )
    if length_normalize:
        return_BL = return_BL / jnp.maximum(terms_BL, 1.0)
    return jax.lax.stop_gradient(jnp.where(mask_BL, return_BL, 0.0))


def whiten(
    values_BL: chex.Array,
    mask_BL: chex.Array,
    *,
    include_padding: bool = False,
    eps: float = 1e-8,
) -> jax.Array:
    """(value - mean) / sqrt(variance + eps) over all tokens of the batch.

    Args:
        values_BL: one value per token.
        mask_BL: response tokens.
        include_padding: take mean and variance over all positions, with zeros outside the mask.
            MiniLLM's code does this. More padding then changes the advantages, even their signs.
        eps: added to the variance, which is divided by n, not by n - 1.

    Returns:
        `[B, L]` float32, without gradient; 0 outside the mask.
    """
    mask_BL = inside(mask_BL)
    values_BL = blank_tokens(values_BL, mask_BL)
    counted_BL = jnp.ones_like(mask_BL) if include_padding else mask_BL
    count = jnp.maximum(counted_BL.sum(dtype=jnp.float32), 1.0)
    centred_BL = jnp.where(counted_BL, values_BL - values_BL.sum() / count, 0.0)
    variance = jnp.square(centred_BL).sum() / count
    white_BL = jnp.where(mask_BL, centred_BL * jax.lax.rsqrt(variance + eps), 0.0)
    return jax.lax.stop_gradient(white_BL)


def group_advantages(
    rewards_BG: chex.Array,
    sample_mask_BG: chex.Array | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
) -> jax.Array:
    """(reward - mean) / (std + eps) within each prompt's group of samples.

    This is the advantage of GRPO (arXiv 2402.03300, section 4.1.2). GAD (arXiv 2511.10643) uses it
    with the discriminator's score as the reward.

    Args:
        rewards_BG: one reward per sample, G samples per prompt.
        sample_mask_BG: samples that count; None: all of them.
        ddof: the variance is divided by n - ddof; 1 or 0.
        eps: added to the standard deviation.

    Returns:
        `[B, G]` float32, without gradient. The value is exactly 0 outside the mask, and in a group
        whose rewards are all equal, such as a group of one sample.

    Raises:
        ValueError: ddof is neither 0 nor 1.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof is {ddof}; the variance is divided by n (0) or n - 1 (1).")
    chex.assert_rank(rewards_BG, 2)
    valid_BG = jnp.ones(jnp.shape(rewards_BG), bool)
    if sample_mask_BG is not None:
        valid_BG = inside(sample_mask_BG)
    rewards_BG = blank_tokens(rewards_BG, valid_BG)
    count_B1 = valid_BG.sum(axis=-1, keepdims=True, dtype=jnp.float32)
    mean_B1 = rewards_BG.sum(axis=-1, keepdims=True) / jnp.maximum(count_B1, 1.0)
    centred_BG = jnp.where(valid_BG, rewards_BG - mean_B1, 0.0)
    squares_B1 = jnp.square(centred_BG).sum(axis=-1, keepdims=True)
    std_B1 = jnp.sqrt(squares_B1 / jnp.maximum(count_B1 - ddof, 1.0))
    # The mean of equal rewards can be off by a rounding error. eps is too small to hide that, so
    # such groups are found by comparison.
    greatest_B1 = jnp.where(valid_BG, rewards_BG, -jnp.inf).max(axis=-1, keepdims=True)
    least_B1 = jnp.where(valid_BG, rewards_BG, jnp.inf).min(axis=-1, keepdims=True)
    flat_B1 = greatest_B1 <= least_B1
    return jax.lax.stop_gradient(jnp.where(flat_B1, 0.0, centred_BG / (std_B1 + eps)))
