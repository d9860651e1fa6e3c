"""The discriminator of generative adversarial distillation (GAD, arXiv 2511.10643)."""

import chex
import jax
import jax.numpy as jnp

from proxykd_jax.losses.numerics import blank_tokens, float32


def discriminator_loss(
    teacher_scores_B: chex.Array,
    student_scores_BG: chex.Array,
    sample_mask_BG: chex.Array | None = None,
) -> jax.Array:
    """-log sigmoid(D(y) - D(y-hat_i)) for every pair of a teacher's answer and a student's sample.

    This is a Bradley-Terry model of "y is the teacher's answer". Only differences of scores count:
    a constant added to all scores of a prompt changes nothing. For a fixed teacher and student the
    optimum is D = log(teacher / student) + a constant per prompt. If the two models agree, all
    scores are equal there and the loss is ln 2.

    Args:
        teacher_scores_B: D(x, y), read at the last token of the teacher's answer.
        student_scores_BG: D(x, y-hat_i), G samples per prompt.
        sample_mask_BG: samples outside the mask give a constant with gradient 0, even if their
            score is NaN. Leave them out of the mean with `reduce_examples`. None: no mask.

    Returns:
        `[B, G]` float32, not reduced. The loss of GAD is the mean.
    """
    chex.assert_rank(student_scores_BG, 2)
    chex.assert_shape(teacher_scores_B, jnp.shape(student_scores_BG)[:1])
    gap_BG = float32(teacher_scores_B)[:, None] - float32(student_scores_BG)
    return -jax.nn.log_sigmoid(blank_tokens(gap_BG, sample_mask_BG))
