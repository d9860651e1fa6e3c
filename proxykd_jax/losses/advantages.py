"""What a sampled token is worth: rewards, returns, and how they are normalised.

All of it is constant for the gradient, whatever was given. A row holds one response: returns add
up over a row's tokens inside the mask, in order, so packed rows have no meaning here.
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

    Its mean over the student's own tokens is -scale times the reverse KL. MiniLLM (arXiv
    2306.08543, section 2.2) has r_t as it is; its code divides by 0.5 (`scale=2`) and clips at
    100. On-policy distillation takes it as the advantage, with `scale` its coefficient.

    Args:
        scorer_logps_BL: log-probs of the sampled tokens under the scorer, nats.
        student_logps_BL: the same under the student that is being rewarded, at sampling time.
        mask_BL: where given, positions outside it give 0.
        scale: > 0.
        clip: the greatest absolute value; none without it.

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
    """The sum of the rewards that follow a token: R_t with its own, R_{t+1} without.

    R_t = sum_{t' >= t} discount^(t' - t) r_t', over T response tokens.

    | `include_current` | value, normalised   | for                                            |
    |-------------------|---------------------|------------------------------------------------|
    | False             | R_{t+1} / (T - t)   | MiniLLM's paper: beside the single-step term   |
    | True              | R_t / (T - t + 1)   | its code, which counts r_t twice beside it     |

    The divisors are the numbers of terms, whatever the discount. The paper prints T - t - 1,
    which is one too few and 0 for the last token but one.

    Args:
        rewards_BL: one reward a token.
        mask_BL: response tokens. Those outside are skipped, so that a gap costs no discount.
        include_current: whether a token's own reward is in its return.
        discount: 0 to 1.
        length_normalize: divide by the number of terms.

    Returns:
        `[B, L]` float32, without gradient; 0 outside the mask and, without its own reward, at
        the last token.

    Raises:
        ValueError: discount outside [0, 1].
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discount is {discount}; it takes 0 to 1.")
    mask_BL = inside(mask_BL)
    chex.assert_rank(mask_BL, 2)
    rewards_BL = blank_tokens(rewards_BL, mask_BL)

    def join(
        later: tuple[jax.Array, jax.Array], earlier: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        """Two stretches of tokens: the product of discounts, the rewards seen from the first."""
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
        values_BL: one value a token.
        mask_BL: response tokens.
        include_padding: take mean and variance over all positions, zeros at the masked ones. So
            does MiniLLM's code, so that more padding changes the advantages, their signs included.
        eps: added to the variance (over n, not n - 1).

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

    GRPO's advantage (arXiv 2402.03300, section 4.1.2), which GAD (arXiv 2511.10643) takes with
    the discriminator's score as the reward.

    Args:
        rewards_BG: one reward a sample, G samples a prompt.
        sample_mask_BG: samples that count; all of them without it.
        ddof: the variance is divided by n - ddof; 1 or 0.
        eps: added to the standard deviation.

    Returns:
        `[B, G]` float32, without gradient; exactly 0 in a group whose rewards are all the same
        (one sample included), and at masked samples.

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
    # Equal rewards: their mean can be off by a rounding, which eps alone would not hide.
    greatest_B1 = jnp.where(valid_BG, rewards_BG, -jnp.inf).max(axis=-1, keepdims=True)
    least_B1 = jnp.where(valid_BG, rewards_BG, jnp.inf).min(axis=-1, keepdims=True)
    flat_B1 = greatest_B1 <= least_B1
    return jax.lax.stop_gradient(jnp.where(flat_B1, 0.0, centred_BG / (std_B1 + eps)))
