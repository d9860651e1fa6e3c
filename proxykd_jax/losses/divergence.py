"""Distances between two next-token distributions over the full vocabulary (eqs. 2 and 8).

Every divergence comes as a building block with one value a token (`*_tokens`) and as a function
with one value an example. Training reduces the former by `batch_terms`; tempered KL, total
variation and the latter are for notebooks. In all of them the value is exact, +inf included where
a divergence is infinite, and the gradient is finite: a zero probability counts as exp(-1e4) in the
backward pass.
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
        teacher_logits_BLV: any float type and any leading axes. Not treated as a constant: wrap
            it in `stop_gradient`, or differentiate with respect to the student alone.
        student_logits_BLV: the same shape.
        mask_BL: where given, positions outside it are computed from zeros and give 0.

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
    """KL(student || teacher) at each position; arguments as in `forward_kl_tokens`."""
    return forward_kl_tokens(student_logits_BLV, teacher_logits_BLV, mask_BL)


def generalized_jsd_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
    *,
    beta: float,
) -> jax.Array:
    """beta KL(t || m) + (1 - beta) KL(s || m), m = beta t + (1 - beta) s, at each position.

    beta sits on the teacher (GKD, arXiv 2306.13649, eq. 1). By its convention 0 and 1 mean the
    forward and the reverse KL, a jump in scale: the divergence itself goes to 0 there, like
    beta KL(t || s) and (1 - beta) KL(s || t).

    Args:
        teacher_logits_BLV, student_logits_BLV, mask_BL: as in `forward_kl_tokens`.
        beta: a Python number in [0, 1].

    Raises:
        ValueError: beta outside [0, 1].
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
    # log(m/t) and log(m/s) through the log-ratio: with beta near an end m is almost one of the
    # two, and the difference of their log-probs would be rounding noise divided by beta.
    teacher_part = jnp.exp(teacher_logps) * log_mixture(1 - beta, -log_ratio)
    student_part = jnp.exp(student_logps) * log_mixture(beta, log_ratio)
    return -(beta * teacher_part + (1 - beta) * student_part).sum(axis=-1)


def total_variation_tokens(
    teacher_logits_BLV: chex.Array,
    student_logits_BLV: chex.Array,
    mask_BL: chex.Array | None = None,
) -> jax.Array:
    """Half the sum of |t - s| at each position, 0 to 1; arguments as in `forward_kl_tokens`.

    For notebooks: training has no need of it.
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
    """T^2 KL(teacher^(1/T) || student^(1/T)) at each position: both softened by T.

    For notebooks: training takes `topk_kl` of softened log-probs, which `topk_logps` gives of
    logits / T, times T^2.

    A softened KL's gradient shrinks like 1 / T^2. The factor undoes that (Hinton, arXiv
    1503.02531, section 2), so that the weight beside an NLL means the same at every T.

    Args:
        teacher_logits_BLV, student_logits_BLV, mask_BL: as in `forward_kl_tokens`.
        temperature: T > 0. At 1 this is `forward_kl_tokens`.
        rescale: False leaves the factor T^2 out, as Mentor-KD's repository does.

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
    """KL(teacher || student), full vocabulary, one value an example (eqs. 2 and 8).

    For notebooks: training calls `forward_kl_tokens`, and `topk_kl` on stored labels.

    Args:
        teacher_logits_BLV, student_logits_BLV: any float type, the same shape.
        mask_BL: response tokens; bool, integer or float.
        reduction: `mean` or `sum` over an example's tokens.

    Returns:
        `[B]` float32 in nats; 0 for an empty mask.

    Raises:
        ValueError: unknown reduction.
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
    """KL(student || teacher), one value an example; arguments as in `forward_kl`.

    For notebooks: training calls `reverse_kl_tokens`.
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
    """Softened KL, one value an example; see `tempered_kl_tokens` and `forward_kl`.

    For notebooks, as `tempered_kl_tokens` is.
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
    """Generalized JSD, one value an example; see `generalized_jsd_tokens` and `forward_kl`.

    For notebooks: training calls `generalized_jsd_tokens`.
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
    """Total variation distance, one value an example; arguments as in `forward_kl`.

    For notebooks: training has no need of it.
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
    """p log(p/q), entry by entry: 0 where p is 0, +inf where only q is, finite gradients."""
    p = jnp.exp(p_logps)
    terms = p * (finite_log(p_logps) - finite_log(q_logps))
    infinite = jnp.where((p > 0) & jnp.isneginf(q_logps), jnp.inf, 0.0)
    return terms + jax.lax.stop_gradient(infinite)
