"""The discriminator of adversarial distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.losses import batch_mean, discriminator_loss, reduce_examples

TEACHER, STUDENT = np.array([1.5]), np.array([[0.2, 1, -0.5, 2.1]])


def test_check_case():
    got = jax.jit(discriminator_loss)(TEACHER, STUDENT)
    assert got.shape == (1, 4) and got.dtype == jnp.float32
    np.testing.assert_allclose(got.mean(), 0.469875350, rtol=1e-6)
    np.testing.assert_allclose(got, np.log1p(np.exp(STUDENT - TEACHER[:, None])), rtol=1e-5)


def test_a_constant_changes_nothing_and_equal_scores_give_ln_2():
    base = discriminator_loss(TEACHER, STUDENT)
    np.testing.assert_allclose(discriminator_loss(TEACHER + 8, STUDENT + 8), base, rtol=1e-5)
    np.testing.assert_allclose(
        discriminator_loss(np.zeros(2), np.zeros((2, 3))), np.log(2), rtol=1e-6
    )
    to_teacher, to_student = jax.grad(lambda t, s: discriminator_loss(t, s).mean(), argnums=(0, 1))(
        jnp.float32(TEACHER), jnp.float32(STUDENT)
    )
    assert (to_teacher < 0).all() and (to_student > 0).all()
    np.testing.assert_allclose(to_teacher.sum() + to_student.sum(), 0, atol=1e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_from_a_sample_that_was_dropped(bad):
    mask = np.array([[1, 0, 1, 1], [0, 0, 0, 0]])
    teacher = jnp.array([1.5, bad])

    def loss(teacher, student):
        return batch_mean(reduce_examples(discriminator_loss(teacher, student, mask), mask))

    student = np.where(mask, np.repeat(STUDENT, 2, axis=0), bad)
    value, grads = jax.value_and_grad(loss, argnums=(0, 1))(teacher, jnp.float32(student))
    kept = discriminator_loss(TEACHER, STUDENT[:, [0, 2, 3]])
    np.testing.assert_allclose(value, kept.mean(), rtol=1e-6)
    assert grads[0][1] == 0 and (np.asarray(grads[1])[mask == 0] == 0).all()
    assert (np.asarray(grads[1])[mask == 1] > 0).all()


def test_the_optimum_is_the_log_ratio_of_the_two_models():
    """Gradient descent on the scores of three answers, over all pairs by enumeration."""
    teacher, student = np.float32([0.6, 0.3, 0.1]), np.float32([0.2, 0.3, 0.5])

    def expected(scores, student):
        losses = discriminator_loss(scores, jnp.broadcast_to(scores, (3, 3)))
        return (teacher[:, None] * student[None, :] * losses).sum()

    @jax.jit
    def descend(scores, student):
        slope = jax.grad(expected)
        return jax.lax.fori_loop(0, 2000, lambda _, d: d - slope(d, student), scores)

    scores = np.asarray(descend(jnp.zeros(3), student))
    ratio = np.log(teacher / student)
    np.testing.assert_allclose(scores - scores.mean(), ratio - ratio.mean(), atol=1e-4)
    assert expected(scores, student) < np.log(2) - 0.05
    # If the student writes like the teacher, no score can tell them apart.
    same = descend(jnp.array([1.0, -1.0, 0.5]), teacher)
    np.testing.assert_allclose(same, same.mean(), atol=1e-4)
    np.testing.assert_allclose(expected(same, teacher), np.log(2), rtol=1e-6)


def test_shapes_are_checked():
    with pytest.raises(AssertionError):
        discriminator_loss(np.zeros(2), STUDENT)
    with pytest.raises(AssertionError):
        discriminator_loss(TEACHER, STUDENT[0])
    with pytest.raises(AssertionError):
        discriminator_loss(TEACHER, STUDENT, np.ones((1, 3)))
