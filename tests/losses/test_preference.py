"""DPO, IPO, SimPO and ORPO: fixture C, the sign of eq. 4, edge cases, and many rounds."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from proxykd_jax.losses import (
    PREFERENCE_LOSSES,
    dpo_loss,
    preference_loss,
    preference_metrics,
)

C = [np.array([x], np.float32) for x in (-12, -15, -13, -14)]
C_TOKENS = {"chosen_tokens_B": np.array([4]), "rejected_tokens_B": np.array([6])}
OPTIONS = {
    "dpo": {"beta": 0.7},
    "simpo": {"beta": 2.0, "margin": 0.5},
    "orpo": {"beta": 0.3},
    "ipo": {"beta": 0.4},
}
every_loss = pytest.mark.parametrize("loss", PREFERENCE_LOSSES)


def pairs(seed=0, count=5):
    rng = np.random.default_rng(seed)
    policy = -rng.uniform(5, 40, size=(2, count))
    reference_logps = policy + rng.normal(size=(2, count))
    tokens = rng.integers(3, 12, size=(2, count))
    vectors = [*policy, *reference_logps]
    return vectors, {"chosen_tokens_B": tokens[0], "rejected_tokens_B": tokens[1]}


SMOOTHED = [(loss, 0.0) for loss in PREFERENCE_LOSSES] + [("dpo", 0.2), ("simpo", 0.2)]


@pytest.mark.parametrize(("loss", "smoothing"), SMOOTHED)
@pytest.mark.parametrize("length_normalize", [False, True])
def test_matches_reference(loss, length_normalize, smoothing):
    vectors, tokens = pairs()
    function = functools.partial(
        preference_loss,
        loss=loss,
        length_normalize=length_normalize,
        label_smoothing=smoothing,
        **OPTIONS[loss],
    )
    got = jax.jit(function)(*vectors, **tokens)
    assert got.dtype == jnp.float32 and got.shape == (5,)
    expected = [
        reference.preference(
            *(v[i] for v in vectors),
            loss=loss,
            smoothing=smoothing,
            length_normalize=length_normalize,
            chosen_tokens=tokens["chosen_tokens_B"][i],
            rejected_tokens=tokens["rejected_tokens_B"][i],
            **OPTIONS[loss],
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_fixture_c():
    def check(expected, rtol=2e-6, **kwargs):
        np.testing.assert_allclose(preference_loss(*C, **C_TOKENS, **kwargs), [expected], rtol=rtol)

    check(0.598138869, loss="dpo", beta=0.1)
    check(0.126928011, loss="dpo", beta=1)
    check(0.000045399, loss="dpo", beta=5, rtol=1e-5)
    check(1.0, loss="ipo", beta=0.5)
    check(9.0, loss="ipo", beta=0.1)
    check(21.006944444, loss="ipo", beta=0.1, length_normalize=True)
    check(2.126928011, loss="simpo", beta=2, margin=1.0)
    check(1.701413278, loss="simpo", beta=2, margin=0.5)
    check(0.995742553, loss="orpo", beta=1)
    nll = 12 / 4
    check(3.099574255 - nll, loss="orpo", beta=0.1, rtol=1e-5)


def test_dpo_loss_is_the_four_vector_case():
    vectors, _ = pairs(1)
    np.testing.assert_array_equal(
        dpo_loss(*vectors, beta=0.3), preference_loss(*vectors, loss="dpo", beta=0.3)
    )


def test_values_where_the_policy_is_the_reference():
    (chosen, rejected, *_), _ = pairs(2)
    same = (chosen, rejected, chosen, rejected)
    for beta in (0.1, 1.0, 5.0):
        np.testing.assert_allclose(dpo_loss(*same, beta=beta), math.log(2), rtol=1e-6)
        np.testing.assert_allclose(
            preference_loss(*same, loss="ipo", beta=beta), 1 / (4 * beta**2), rtol=1e-6
        )


def test_sign_of_eq_4():
    """Descent raises y and lowers y-hat; eq. 4 as printed would do the opposite."""
    same = [jnp.float32(x) for x in (C[0], C[1], C[0], C[1])]
    up, down = jax.grad(lambda *v: dpo_loss(*v, beta=0.4).sum(), argnums=(0, 1))(*same)
    np.testing.assert_allclose([up[0], down[0]], [-0.2, 0.2], rtol=1e-6)


@every_loss
def test_gradient_raises_chosen_and_lowers_rejected(loss):
    (chosen, rejected, *_), tokens = pairs(3)
    up, down = jax.grad(
        lambda a, b: preference_loss(
            a, b, chosen, rejected, loss=loss, **OPTIONS[loss], **tokens
        ).sum(),
        argnums=(0, 1),
    )(jnp.float32(chosen), jnp.float32(rejected))
    assert (up < 0).all() and (down > 0).all()


def test_equal_answers_give_no_gradient():
    """If y = y-hat, raising one lowers the other by as much, so the gradient is zero."""

    def loss(theta):
        logp = -jnp.square(theta) * jnp.array([3.0, 5.0])
        return dpo_loss(logp, logp, logp * 0.9, logp * 0.9, beta=1.0).sum()

    assert jax.grad(loss)(jnp.float32(0.7)) == 0


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_simpo_and_orpo_ignore_the_reference(loss):
    vectors, tokens = pairs(4)
    call = functools.partial(preference_loss, loss=loss, **OPTIONS[loss], **tokens)
    np.testing.assert_array_equal(call(*vectors), call(*vectors[:2]))


def test_ipo_turns_round_beyond_its_margin_and_dpo_never_does():
    def slope(h, loss, beta):
        zero = jnp.zeros(1)
        return jax.grad(lambda x: preference_loss(x, zero, zero, zero, loss=loss, beta=beta)[0])(
            jnp.array([h])
        )[0]

    assert slope(0.9, "ipo", 0.5) < 0 < slope(1.1, "ipo", 0.5)
    assert slope(1.0, "ipo", 0.5) == 0
    assert all(slope(h, "dpo", 0.5) < 0 for h in (0.9, 1.0, 1.1, 20.0))


@every_loss
@pytest.mark.parametrize("values", [
    (-np.inf, -5, -5, -5), (-5, -np.inf, -5, -5), (-np.inf, -np.inf, -5, -5),
    (-np.inf, -5, -np.inf, -5), (-5, -5, -5, -np.inf), (0, -5, -5, -5), (-5, 0, -5, -5),
    (0, 0, 0, 0), (-3e4, -1e-6, -1, -1),
])  # fmt: skip
def test_gradients_are_finite_at_probability_zero_and_one(loss, values):
    vectors = [jnp.array([v], jnp.float32) for v in values]
    value, grads = jax.value_and_grad(
        lambda *v: preference_loss(*v, loss=loss, **OPTIONS[loss], **C_TOKENS).sum(),
        argnums=(0, 1, 2, 3),
    )(*vectors)
    assert not np.isnan(value)
    for grad in grads:
        assert np.isfinite(grad).all()


def test_log_odds_next_to_certainty():
    """Computed by subtraction, log(1 - exp b) would be log 0 at b = -1e-5 / 4."""
    chosen, rejected = np.float32(-1e-5), np.float32(-8.0)
    got = preference_loss(
        np.array([chosen]), np.array([rejected]), loss="orpo", beta=1.0, **C_TOKENS
    )
    expected = reference.preference(
        float(chosen), float(rejected), 0, 0, loss="orpo", beta=1.0,
        chosen_tokens=4, rejected_tokens=6,
    )  # fmt: skip
    np.testing.assert_allclose(got, [expected], rtol=1e-3)


@every_loss
def test_nothing_leaks_from_an_invalid_pair(loss):
    vectors, tokens = pairs(5)
    mask = np.array([1, 0, 1, 1, 0])

    def run(vs):
        return jax.value_and_grad(
            lambda *v: (
                mask * preference_loss(*v, loss=loss, **OPTIONS[loss], **tokens, pair_mask_B=mask)
            ).sum(),
            argnums=(0, 1),
        )(*(jnp.float32(v) for v in vs))

    value, grads = run([np.where(mask, v, np.nan) for v in vectors])
    clean_value, clean_grads = run(vectors)
    assert value == clean_value
    for got, want in zip(grads, clean_grads, strict=True):
        np.testing.assert_array_equal(got, want)
        assert (np.asarray(got)[mask == 0] == 0).all()


def test_metrics():
    vectors, tokens = pairs(6)
    metrics = preference_metrics(*vectors, beta=0.5)
    h = 0.5 * ((vectors[0] - vectors[2]) - (vectors[1] - vectors[3]))
    np.testing.assert_allclose(metrics["reward_margin"], h, rtol=2e-5, atol=1e-5)
    np.testing.assert_array_equal(metrics["reward_accuracy"], h > 0)
    np.testing.assert_allclose(
        metrics["reward_chosen"], 0.5 * (vectors[0] - vectors[2]), rtol=2e-5, atol=1e-5
    )
    same = (vectors[0], vectors[1], vectors[0], vectors[1])
    np.testing.assert_array_equal(preference_metrics(*same, beta=1)["reward_accuracy"], 0.5)
    simpo = preference_metrics(*vectors[:2], loss="simpo", beta=2.0, **tokens)
    np.testing.assert_allclose(
        simpo["reward_chosen"], 2 * vectors[0] / tokens["chosen_tokens_B"], rtol=1e-6
    )


@pytest.mark.parametrize(("kwargs", "sentence"), [
    ({"loss": "kto", "beta": 1}, "one of dpo, simpo, orpo, ipo"),
    ({"loss": "dpo", "beta": 0}, "above 0"),
    ({"loss": "simpo", "beta": 2, **C_TOKENS}, "needs margin"),
    ({"loss": "simpo", "beta": 2, "margin": 0.5}, "chosen_tokens_B"),
    ({"loss": "orpo", "beta": 1}, "chosen_tokens_B"),
    ({"loss": "dpo", "beta": 1, "length_normalize": True}, "chosen_tokens_B"),
    ({"loss": "dpo", "beta": 1, "margin": 0.5}, "would ignore"),
    ({"loss": "dpo", "beta": 1, "label_smoothing": 0.5}, "below 0.5"),
    ({"loss": "ipo", "beta": 1, "label_smoothing": 0.1}, "not for ipo"),
])  # fmt: skip
def test_mistakes_are_refused(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        preference_loss(*C, **kwargs)


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_a_missing_reference_is_refused(loss):
    with pytest.raises(ValueError, match="reference_chosen_B"):
        preference_loss(*C[:2], loss=loss, beta=1)
    with pytest.raises(AssertionError):
        preference_loss(*C[:3], np.zeros(2, np.float32), loss=loss, beta=1)


# A prompt has a handful of possible answers, so the expectation over all pairs is exact.


def expected_loss(logits_V, reference_logps_V, teacher_V, rejected_V, beta):
    """The expected DPO loss over y ~ teacher and y-hat ~ rejected, by enumeration."""
    logps_V, size = jax.nn.log_softmax(logits_V), len(teacher_V)
    chosen, rejected = (x.ravel() for x in np.mgrid[:size, :size])
    losses = dpo_loss(
        logps_V[chosen],
        logps_V[rejected],
        reference_logps_V[chosen],
        reference_logps_V[rejected],
        beta=beta,
    )
    return (losses * teacher_V[chosen] * rejected_V[rejected]).sum()


def run_round(reference_V, teacher_V, rejected_V, beta):
    """Trains one round to convergence by damped Newton steps; the loss is convex in the logits."""
    start = reference_logps = jnp.log(jnp.asarray(reference_V, jnp.float32))
    arrays = (reference_logps, jnp.float32(teacher_V), jnp.float32(rejected_V), jnp.float32(beta))
    logits = newton(start, *arrays)
    assert np.abs(jax.grad(expected_loss)(logits, *arrays)).max() < 1e-6
    return np.asarray(jax.nn.softmax(logits), np.float64)


@jax.jit
def newton(logits, *arrays):
    def improve(_, logits):
        grad = jax.grad(expected_loss)(logits, *arrays)
        hessian = jax.hessian(expected_loss)(logits, *arrays)
        # The logits have a free constant, which the matrix of ones fixes.
        step = jnp.linalg.solve(hessian + jnp.ones_like(hessian), grad)
        return logits - step * jnp.minimum(1.0, 1.0 / jnp.abs(step).max())

    return jax.lax.fori_loop(0, 60, improve, logits)


TEACHER = np.array([0.6, 0.3, 0.1])
START = np.array([0.4, 0.3, 0.3])


@pytest.mark.parametrize(
    ("beta", "optimum"),
    [(1.0, TEACHER), (2.0, np.array([0.508666190, 0.311493154, 0.179840656]))],
)
def test_population_optimum_of_one_round(beta, optimum):
    np.testing.assert_allclose(run_round(START, TEACHER, START, beta), optimum, atol=2e-5)


@pytest.mark.parametrize(
    ("beta", "optimum"),
    [
        (1.0, [0.769230769, 0.192307692, 0.038461538]),
        (2.0, [0.614755911, 0.266197118, 0.119046970]),
    ],
)
def test_rejected_answers_from_another_model_than_the_reference(beta, optimum):
    """y-hat comes from a base model and the reference is warmed up: the optimum overshoots."""
    base = np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose(run_round(START, TEACHER, base, beta), optimum, atol=2e-5)


def test_the_teacher_itself_is_not_a_fixed_point_where_the_rejected_come_from_a_base_model():
    """From a perfect policy and reference, one round ends at teacher^2 / base."""
    base = np.array([0.2, 0.3, 0.5])
    beyond = TEACHER**2 / base
    np.testing.assert_allclose(
        run_round(TEACHER, TEACHER, base, 1.0), beyond / beyond.sum(), atol=2e-5
    )
    np.testing.assert_allclose(run_round(TEACHER, TEACHER, TEACHER, 1.0), TEACHER, atol=2e-5)


def test_gradient_descent_gets_to_the_same_optimum_from_ln_2():
    base = np.array([0.2, 0.3, 0.5])
    start = jnp.log(jnp.float32(START))
    arrays = (start, jnp.float32(TEACHER), jnp.float32(base), jnp.float32(2.0))
    np.testing.assert_allclose(expected_loss(start, *arrays), math.log(2), rtol=1e-6)
    descend = jax.jit(
        lambda x: jax.lax.fori_loop(0, 500, lambda _, x: x - jax.grad(expected_loss)(x, *arrays), x)
    )
    np.testing.assert_allclose(
        jax.nn.softmax(descend(start)), [0.614755911, 0.266197118, 0.119046970], atol=2e-5
    )


@pytest.mark.parametrize("beta", [0.4, 0.5, 0.75, 1.0, 2.0])
def test_each_round_multiplies_the_log_ratio_error(beta):
    """The factor is 1 - 1/beta: rounds diverge below beta 1/2, oscillate at 1/2, converge at 1."""

    def error(policy):
        log_ratio = np.log(policy) - np.log(TEACHER)
        return log_ratio - log_ratio.mean()

    policy = np.array([0.5, 0.3, 0.2])
    for _ in range(2):
        before, policy = error(policy), run_round(policy, TEACHER, policy, beta)
        np.testing.assert_allclose(error(policy), (1 - 1 / beta) * before, atol=2e-4)
