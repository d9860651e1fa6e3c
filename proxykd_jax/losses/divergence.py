"""Distances between two next-token distributions over the full vocabulary (eqs. 2 and 8).

Every divergence has two functions: one returns a value per token (`*_tokens`), the other a value
per example. Training uses the first kind and reduces it with `batch_terms`. The second kind is for
notebooks, and so are both functions of the tempered KL and of the total variation.

Values are exact, and +inf where a divergence is infinite. Gradients are always finite: in the
backward pass a probability of zero counts as exp(-1e4).
"""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import blank_outside, finite_log, log_mixture
from proxykd_jax.losses.reduction import reduce_tokens


def forward_kl_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
) -> jax.Array:
    """KL(teacher || student) at each position, in nats.

    Args:
        teacher_logits_BLV: any float type and any leading axes. It is not treated as a constant:
            wrap it in `stop_gradient`, or differentiate with respect to the student alone.
        student_logits_BLV: any float type, the same shape.
        mask_BL: positions outside the mask are computed from zeros and give 0. None: no mask.

    Returns:
        `[B, L]` float32.
    """
    teacher_logps, student_logps = _both_logps(teacher_logits_BLV, student_logits_BLV, mask_BL)
    return kl_terms(teacher_logps, student_logps).sum(axis=-1)


def reverse_kl_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
) -> jax.Array:
    """KL(student || teacher) at each position, in nats.

    Arguments and result are as in `forward_kl_tokens`.
    """
    return forward_kl_tokens(student_logits_BLV, teacher_logits_BLV, mask_BL)


def generalized_jsd_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    beta: float,
) -> jax.Array:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, at each position.

    t is the teacher and s the student; beta is the teacher's weight (GKD, arXiv 2306.13649, eq. 1).
    By GKD's convention beta = 0 is the forward KL and beta = 1 the reverse KL. The scale jumps
    there: the formula itself goes to 0 like beta KL(t || s) and (1 - beta) KL(s || t).

    Args:
        teacher_logits_BLV, student_logits_BLV, mask_BL: as in `forward_kl_tokens`.
        beta: a Python number in [0, 1].

    Returns:
        `[B, L]` float32, nats.

    Raises:
        ValueError: beta is outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(
            f"beta is {beta}; the generalized JSD takes 0 (forward KL) to 1 (reverse KL)."
        )
    if beta == 0:
        return forward_kl_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL)
    if beta == 1:
        return reverse_kl_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL)
    teacher_logps, student_logps = _both_logps(teacher_logits_BLV, student_logits_BLV, mask_BL)
    log_ratio = finite_log(teacher_logps) - finite_log(student_logps)
    # log(m/t) and log(m/s) are computed from the log-ratio. With beta near 0 or 1, m is almost
    # equal to one of the two, and a difference of log-probs would be rounding noise over beta.
    teacher_part = jnp.exp(teacher_logps) * log_mixture(1 - beta, -log_ratio)
    student_part = jnp.exp(student_logps) * log_mixture(beta, log_ratio)
    return -(beta * teacher_part + (1 - beta) * student_part).sum(axis=-1)


def total_variation_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
) -> jax.Array:
    """Total variation: half the sum of |t - s| at each position.

    For notebooks; training does not use it. Arguments are as in `forward_kl_tokens`.

    Returns:
        `[B, L]` float32, 0 to 1.
    """
    teacher_logps, student_logps = _both_logps(teacher_logits_BLV, student_logits_BLV, mask_BL)
    return 0.5 * jnp.abs(jnp.exp(teacher_logps) - jnp.exp(student_logps)).sum(axis=-1)


def tempered_kl_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    temperature: float,
    rescale: bool = True,
) -> jax.Array:
    """T^2 KL(teacher^(1/T) || student^(1/T)) at each position: both distributions softened by T.

    For notebooks. Training computes `topk_logps` of logits / T, takes `topk_kl` of these log-probs
    and multiplies it by T^2.

    The gradient of a softened KL shrinks like 1 / T^2, and the factor T^2 undoes that (Hinton,
    arXiv 1503.02531, section 2). So a weight relative to an NLL means the same at every T.

    Args:
        teacher_logits_BLV, student_logits_BLV, mask_BL: as in `forward_kl_tokens`.
        temperature: T > 0. With T = 1 this is `forward_kl_tokens`.
        rescale: False omits the factor T^2, as Mentor-KD's repository does.

    Returns:
        `[B, L]` float32, nats (times T^2).

    Raises:
        ValueError: temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    kl_BL = forward_kl_tokens(
        blank_outside(teacher_logits_BLV, mask_BL) / temperature,
        blank_outside(student_logits_BLV, mask_BL) / temperature,
    )
    return temperature**2 * kl_BL if rescale else kl_BL


def forward_kl(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str = "mean",
) -> jax.Array:
    """KL(teacher || student) over the full vocabulary, one value per example (eqs. 2 and 8).

    For notebooks. Training calls `forward_kl_tokens`, or `topk_kl` on stored labels.

    Args:
        teacher_logits_BLV, student_logits_BLV: any float type, the same shape.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.

    Returns:
        `[B]` float32 in nats; 0 for an empty mask.

    Raises:
        ValueError: the reduction is unknown.
    """
    chex.assert_rank(student_logits_BLV, 3)
    kl_BL = forward_kl_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL)
    return reduce_tokens(kl_BL, mask_BL, reduction=reduction)


def reverse_kl(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str = "mean",
) -> jax.Array:
    """KL(student || teacher), one value per example.

    For notebooks; training calls `reverse_kl_tokens`. Arguments, result and errors are as in
    `forward_kl`.
    """
    chex.assert_rank(student_logits_BLV, 3)
    kl_BL = reverse_kl_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL)
    return reduce_tokens(kl_BL, mask_BL, reduction=reduction)


def tempered_kl(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array,
    *,
    temperature: float,
    rescale: bool = True,
    reduction: str = "mean",
) -> jax.Array:
    """Softened KL, one value per example.

    For notebooks. `temperature` and `rescale` are as in `tempered_kl_tokens`; other arguments, the
    result and the errors are as in `forward_kl`.
    """
    chex.assert_rank(student_logits_BLV, 3)
    kl_BL = tempered_kl_tokens(
        teacher_logits_BLV, student_logits_BLV, mask_BL, temperature=temperature, rescale=rescale
    )
    return reduce_tokens(kl_BL, mask_BL, reduction=reduction)


def generalized_jsd(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array,
    *,
    beta: float,
    reduction: str = "mean",
) -> jax.Array:
    """Generalized JSD, one value per example.

    For notebooks; training calls `generalized_jsd_tokens`, where `beta` is explained. Other
    arguments, the result and the errors are as in `forward_kl`.
    """
    chex.assert_rank(student_logits_BLV, 3)
    jsd_BL = generalized_jsd_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL, beta=beta)
    return reduce_tokens(jsd_BL, mask_BL, reduction=reduction)


def total_variation(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array,
    *,
    reduction: str = "mean",
) -> jax.Array:
    """Total variation distance, one value per example.

    For notebooks; training does not use it. Arguments and errors are as in `forward_kl`. The result
    is `[B]` float32, 0 to 1 for `mean`.
    """
    chex.assert_rank(student_logits_BLV, 3)
    distance_BL = total_variation_tokens(teacher_logits_BLV, student_logits_BLV, mask_BL)
    return reduce_tokens(distance_BL, mask_BL, reduction=reduction)


def _both_logps(
    teacher_logits: chex.Array, student_logits: chex.Array, mask: chex.Array | None
) -> tuple[jax.Array, jax.Array]:
    chex.assert_equal_shape([teacher_logits, student_logits])
    return (
        jax.nn.log_softmax(blank_outside(teacher_logits, mask)),
        jax.nn.log_softmax(blank_outside(student_logits, mask)),
    )


def kl_terms(p_logps: jax.Array, q_logps: jax.Array) -> jax.Array:
    """p log(p/q) of each entry, in nats, with finite gradients.

    The value is 0 where p is 0, and +inf where q is 0 and p is not.

    Args:
        p_logps, q_logps: log-probs of one shape.

    Returns:
        Float32 of the same shape.
    """
    p = jnp.exp(p_logps)
    terms = p * (finite_log(p_logps) - finite_log(q_logps))
    infinite = jnp.where((p > 0) & jnp.isneginf(q_logps), jnp.inf, 0.0)
    return terms + jax.lax.stop_gradient(infinite)
