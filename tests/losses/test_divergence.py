"""Full-vocabulary divergences: values, the ends of beta, symmetry, edge cases, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from proxykd_jax.losses import (
    forward_kl,
    forward_kl_tokens,
    generalized_jsd,
    generalized_jsd_tokens,
    nll,
    reduce_tokens,
    reverse_kl,
    reverse_kl_tokens,
    tempered_kl,
    tempered_kl_tokens,
    token_logps,
    total_variation,
    total_variation_tokens,
)

A_P = np.array([[[2, 1, 0], [0, 0, 0], [1, -1, 0.5]]])
A_Q = np.array([[[1, 1, 0], [0.5, 0, -0.5], [0, 1, 0]]])
A_MASK = np.array([[1, 1, 0]])

CASES = {
    "forward_kl": (forward_kl, forward_kl_tokens, reference.kl),
    "reverse_kl": (reverse_kl, reverse_kl_tokens, lambda t, s: reference.kl(s, t)),
    "tempered_kl": (
        functools.partial(tempered_kl, temperature=2.0),
        functools.partial(tempered_kl_tokens, temperature=2.0),
        lambda t, s: 4 * reference.kl(t / 2, s / 2),
    ),
    "total_variation": (total_variation, total_variation_tokens, reference.total_variation),
}
for _beta in (0, 0.1, 0.5, 0.9, 1):
    CASES[f"jsd_{_beta}"] = (
        functools.partial(generalized_jsd, beta=_beta),
        functools.partial(generalized_jsd_tokens, beta=_beta),
        functools.partial(lambda t, s, beta: reference.jsd(t, s, beta), beta=_beta),
    )
every_case = pytest.mark.parametrize("name", CASES)


def batch(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    teacher, student = rng.normal(scale=scale, size=(2, 3, 4, 6))
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]])
    return teacher, student, mask


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_reference(name, reduction):
    function, tokens, expected = CASES[name]
    teacher, student, mask = batch()
    positions = reference.over_positions(expected, teacher, student)
    np.testing.assert_allclose(tokens(teacher, student), positions, rtol=2e-5, atol=2e-7)
    got = jax.jit(functools.partial(function, reduction=reduction))(teacher, student, mask)
    assert got.dtype == jnp.float32 and got.shape == (3,)
    np.testing.assert_allclose(
        got, reference.per_example(positions, mask, reduction), rtol=2e-5, atol=2e-7
    )


def test_fixture_a():
    check = functools.partial(np.testing.assert_allclose, atol=2e-7)
    check(forward_kl_tokens(A_P, A_Q), [[0.119629795, 0.081657382, 0.589297343]])
    check(reverse_kl_tokens(A_P, A_Q), [[0.123292362, 0.078420952, 0.837833639]])
    check(forward_kl(A_P, A_Q, A_MASK), [0.100643589])
    check(reverse_kl(A_P, A_Q, A_MASK), [0.100856657])
    for beta, first, mean in (
        (0.1, 0.010759273, 0.009024627),
        (0.5, 0.030045291, 0.024920691),
        (0.9, 0.011019385, 0.009040023),
    ):
        check(generalized_jsd_tokens(A_P, A_Q, beta=beta)[0, 0], first)
        check(generalized_jsd(A_P, A_Q, A_MASK, beta=beta), [mean])


def test_fixture_a_gradients():
    def first(function, q):
        return function(A_P, q, A_MASK)[0]

    grad = jax.grad(functools.partial(first, forward_kl))(jnp.float32(A_Q))[0, 0]
    np.testing.assert_allclose(grad, [-0.121461079, 0.088795164, 0.032665915], atol=1e-7)
    grad = jax.grad(lambda q: reverse_kl_tokens(A_P, q)[0, 0])(jnp.float32(A_Q))[0, 0]
    np.testing.assert_allclose(grad, [-0.243965631, 0.178353167, 0.065612464], atol=2e-7)


def test_jsd_near_its_ends_is_a_scaled_kl():
    """Rounding errors must shrink with the divergence: the tolerance is relative, 1e-4."""
    low, high = 1e-4, 1 - 1e-4
    first = (A_P[:, :1], A_Q[:, :1])
    np.testing.assert_allclose(
        generalized_jsd_tokens(*first, beta=low) / low, [[0.119617701]], rtol=1e-5
    )
    np.testing.assert_allclose(
        generalized_jsd_tokens(*first, beta=high) / (1 - high), [[0.123279113]], rtol=1e-5
    )


@pytest.mark.parametrize("beta", [0.05, 0.3, 0.5, 0.8])
def test_jsd_symmetry_and_bound(beta):
    teacher, student, _ = batch(1, scale=20.0)
    value = generalized_jsd_tokens(teacher, student, beta=beta)
    swapped = generalized_jsd_tokens(student, teacher, beta=1 - beta)
    np.testing.assert_allclose(value, swapped, rtol=1e-5, atol=1e-7)
    entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    assert (value >= -1e-7).all() and (value <= entropy + 1e-6).all()


@every_case
def test_zero_value_and_gradient_where_equal(name):
    function, _, _ = CASES[name]
    teacher, _, mask = batch(2)
    value, grad = jax.value_and_grad(lambda s: function(teacher, s, mask).sum())(
        jnp.float32(teacher)
    )
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(grad, 0, atol=3e-7)


@every_case
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask(name, bad):
    function, _, _ = CASES[name]
    teacher, student, mask = batch(3)
    inside = (mask != 0)[..., None]

    def loss(t, s):
        return function(t, s, mask).sum()

    both = jax.value_and_grad(loss, argnums=(0, 1))
    spoiled_value, spoiled = both(
        jnp.float32(np.where(inside, teacher, bad)), jnp.float32(np.where(inside, student, bad))
    )
    clean_value, clean = both(jnp.float32(teacher), jnp.float32(student))
    assert spoiled_value == clean_value
    for got, want in zip(spoiled, clean, strict=True):
        np.testing.assert_array_equal(got, want)
        assert (np.asarray(got)[mask == 0] == 0).all()


@every_case
def test_empty_mask(name):
    function, _, _ = CASES[name]
    teacher, student, mask = batch(4)
    value, grad = jax.value_and_grad(lambda s: function(teacher, s, 0 * mask).sum())(
        jnp.float32(student)
    )
    assert value == 0 and (np.asarray(grad) == 0).all()


IMPOSSIBLE = [
    # (teacher, student): a zero in one, in the other, in both; certainty; underflow
    ([0, -np.inf, 1], [0, 1, 2]),
    ([0, 1, 2], [0, -np.inf, 1]),
    ([0, -np.inf, 1], [1, -np.inf, 0]),
    ([0, -np.inf, -np.inf], [1, 2, 0]),
    ([300, 0, 0], [0, 300, 0]),
    ([0, -np.inf, 1], [-np.inf, 1, 2]),
]


@every_case
@pytest.mark.parametrize("logits", IMPOSSIBLE)
def test_zero_probabilities_give_the_true_value_and_finite_gradients(name, logits):
    _, tokens, expected = CASES[name]
    teacher, student = (jnp.array([[x]], jnp.float32) for x in logits)
    value, grads = jax.value_and_grad(lambda t, s: tokens(t, s).sum(), argnums=(0, 1))(
        teacher, student
    )
    # With logits 300 apart the reference underflows to 0 in float64 too, except in log space.
    if max(logits[0]) < 300:
        np.testing.assert_allclose(value, expected(*map(np.array, logits)), rtol=1e-5, atol=1e-6)
    for grad in grads:
        assert np.isfinite(grad).all()


def test_an_infinite_reverse_kl_still_points_away_from_the_impossible_token():
    grad = jax.grad(lambda s: reverse_kl_tokens(jnp.array([0.0, -jnp.inf, 1.0]), s))(jnp.zeros(3))
    assert grad[1] > 0 and grad[0] < 0 and grad[2] < 0


def test_bfloat16_input_is_computed_in_float32():
    teacher, student, mask = (jnp.asarray(x, jnp.bfloat16) for x in batch(5))
    for function, _, _ in CASES.values():
        got = function(teacher, student, mask)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(
            got, function(teacher.astype(jnp.float32), student.astype(jnp.float32), mask)
        )


def test_gradients_match_finite_differences():
    rng = np.random.default_rng(6)
    teacher, student = rng.normal(size=(2, 5))
    for name, (_, tokens, expected) in CASES.items():
        grad = jax.grad(tokens, argnums=1)(jnp.float32(teacher), jnp.float32(student))
        for v in range(5):
            step = 1e-5 * np.eye(5)[v]
            numeric = (expected(teacher, student + step) - expected(teacher, student - step)) / 2e-5
            np.testing.assert_allclose(grad[v], numeric, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("beta", [-0.1, 1.1])
def test_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match=r"takes 0 .*to 1"):
        generalized_jsd(A_P, A_Q, A_MASK, beta=beta)


def test_shapes_are_checked():
    for function in (forward_kl, reverse_kl, total_variation):
        with pytest.raises(AssertionError):
            function(A_P, A_Q[:, :2], A_MASK)
        with pytest.raises(AssertionError):
            function(A_P, A_Q, A_MASK[:, :2])
        with pytest.raises(AssertionError):
            function(A_P[0], A_Q[0], A_MASK[0])


def test_cross_entropy_and_kl_have_one_gradient():
    """Code of other authors uses the cross-entropy instead, which is the KL plus H(p)."""
    labels = np.array([[0, 2, 1]])
    p = np.exp(reference.log_softmax(A_P))

    def cross_entropy(q):
        return reduce_tokens(-(p * jax.nn.log_softmax(q)).sum(-1), A_MASK)[0]

    def mix(soft):
        return lambda q: 0.5 * nll(token_logps(q, labels), A_MASK)[0] + 0.5 * soft(q)

    q = jnp.float32(A_Q)
    kl_mix, kl_grad = jax.value_and_grad(mix(lambda q: forward_kl(A_P, q, A_MASK)[0]))(q)
    ce_mix, ce_grad = jax.value_and_grad(mix(cross_entropy))(q)
    np.testing.assert_allclose(ce_mix, 1.168639881, rtol=1e-6)
    np.testing.assert_allclose(ce_mix - kl_mix, 0.5 * 0.965503935, rtol=1e-5)
    np.testing.assert_allclose(ce_grad, kl_grad, atol=1e-7)
    assert (np.asarray(kl_grad)[0, 2] == 0).all()


def test_black_box_distillation_is_not_touched_by_the_scorer():
    """The NLL does not depend on the scorer; the gradient of the KL does."""
    noise = np.random.default_rng(7).normal(size=A_P.shape)
    slope = jax.grad(lambda q, p: forward_kl(p, q, A_MASK)[0])
    assert np.abs(slope(jnp.float32(A_Q), A_P) - slope(jnp.float32(A_Q), noise)).max() > 0.01


def test_tempered_kl_on_fixture_a():
    """TAKD at T = 2, and Mentor-KD's mix of 0.7 NLL, with and without the factor T^2."""
    likelihood = 1.271132237
    np.testing.assert_allclose(
        nll(token_logps(A_Q, np.array([[0, 2, 1]])), A_MASK), [likelihood], rtol=1e-6
    )
    soft = tempered_kl(A_P, A_Q, A_MASK, temperature=2.0)[0]
    np.testing.assert_allclose(soft, 0.103432817, rtol=2e-6)
    np.testing.assert_allclose(0.5 * likelihood + 0.5 * soft, 0.687282527, rtol=1e-6)
    np.testing.assert_allclose(0.7 * likelihood + 0.3 * soft, 0.920822411, rtol=1e-6)
    bare = tempered_kl(A_P, A_Q, A_MASK, temperature=2.0, rescale=False)[0]
    np.testing.assert_allclose(bare, 0.025858204, rtol=2e-6)
    np.testing.assert_allclose(0.7 * likelihood + 0.3 * bare, 0.897550027, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1, 3.0])
def test_tempered_kl_matches_reference(temperature):
    teacher, student, mask = batch(8)
    positions = temperature**2 * reference.over_positions(
        reference.kl, teacher / temperature, student / temperature
    )
    tokens = tempered_kl_tokens(teacher, student, temperature=temperature)
    np.testing.assert_allclose(tokens, positions, rtol=2e-5, atol=1e-6)
    if temperature == 1:
        np.testing.assert_array_equal(tokens, forward_kl_tokens(teacher, student))
    for reduction in ("mean", "sum"):
        got = jax.jit(functools.partial(tempered_kl, temperature=temperature, reduction=reduction))(
            teacher, student, mask
        )
        expected = reference.per_example(positions, mask, reduction)
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_the_gradient_of_the_tempered_kl_keeps_its_size():
    """It tends to (centred teacher - centred student) / V; without T^2 it would vanish."""
    teacher, student, _ = batch(9)
    teacher, student = jnp.float32(teacher), jnp.float32(student)

    def slope(temperature, **options):
        return jax.grad(
            lambda s: tempered_kl_tokens(teacher, s, temperature=temperature, **options).sum()
        )(student)

    def centre(x):
        return x - x.mean(-1, keepdims=True)

    limit = (centre(student) - centre(teacher)) / student.shape[-1]
    # T multiplies the rounding error of the softmax.
    np.testing.assert_allclose(slope(1e3), limit, atol=5e-3)
    assert np.abs(slope(1e3, rescale=False)).max() < 1e-5
    with pytest.raises(ValueError, match="temperature is 0"):
        tempered_kl(A_P, A_Q, A_MASK, temperature=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_is_finite_where_either_side_underflows(beta):
    """Disjoint models have a JSD of H(beta); their KL is 1000 nats or more."""
    entropy = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
    for size in (1e3, 4e3):
        logits = jnp.array([size, 0.0, -size]), jnp.array([-size, 0.0, size])
        value, grads = jax.value_and_grad(
            lambda t, s: generalized_jsd_tokens(t, s, beta=beta), argnums=(0, 1)
        )(*logits)
        np.testing.assert_allclose(value, entropy, rtol=1e-5)
        assert all(np.isfinite(grad).all() for grad in grads)
        assert forward_kl_tokens(*logits) >= size
