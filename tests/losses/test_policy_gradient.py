"""Losses on the student's own samples: fixture B, enumerated small models, edge cases."""

import functools
import itertools

import jax
import jax.numpy as jnp
import method_reference
import numpy as np
import pytest

from proxykd_jax.losses import (
    log_ratio_rewards,
    low_variance_kl_tokens,
    mixture_logps,
    mixture_weights,
    policy_gradient_tokens,
    reverse_kl_tokens,
    rewards_to_go,
    sampled_reverse_kl_tokens,
    single_step_kl_tokens,
)

B_P, B_OLD = np.array([[-1, -0.5, -2, -0.2]]), np.array([[-0.5, -1.5, -1, -0.9]])
B_NOW = B_OLD + np.array([[0.3, -0.3, 0.1, 0]])
B_WEIGHTS = [[1.085415548, 0.744237906, 1.144720239, 0.831427603]]
B_RHO = [[1.465157737, 0.551345001, 1.265111518, 0.831427603]]
ONES = np.ones((1, 4))
A_P, A_Q = np.float32([2, 1, 0]), np.float32([1, 1, 0])
check = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
TOKEN_INPUTS = ("now", "old", "scorer", "advantage", "weight")


def batch(seed=0):
    """Log-probs (now, at sampling, of the scorer), advantages, weights, and a mask with gaps."""
    rng = np.random.default_rng(seed)
    now, old, scorer = -rng.uniform(0.1, 4, size=(3, 3, 5))
    mask = np.array([[0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    values = now, old, scorer, rng.normal(size=(3, 5)), rng.uniform(0.5, 1.25, size=(3, 5))
    return dict(zip(TOKEN_INPUTS, values, strict=True)), mask


# Every loss, as a function of the union of all inputs.
LOSSES = {
    "plain": lambda x, mask: policy_gradient_tokens(x["now"], x["old"], x["advantage"], mask),
    "clipped": lambda x, mask: policy_gradient_tokens(
        x["now"], x["old"], x["advantage"], mask, clip=0.2, importance_weights_BL=x["weight"]
    ),
    "distillation": lambda x, mask: sampled_reverse_kl_tokens(
        x["now"], x["old"], x["scorer"], mask, coef=0.7
    ),
    "low_variance_kl": lambda x, mask: low_variance_kl_tokens(x["now"], x["old"], mask),
    "minillm": lambda x, mask: policy_gradient_tokens(
        x["now"],
        x["old"],
        rewards_to_go(log_ratio_rewards(x["scorer"], x["old"], mask), mask, include_current=False),
        mask,
        clip=0.2,
        importance_weights_BL=mixture_weights(x["scorer"], x["old"], mask, scorer_share=0.2),
    ),
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def test_fixture_b_minillm_as_in_the_paper():
    weights = mixture_weights(B_P, B_OLD, scorer_share=0.2)
    check(weights, B_WEIGHTS)
    returns = rewards_to_go(log_ratio_rewards(B_P, B_OLD), ONES, include_current=False)
    unclipped = policy_gradient_tokens(
        B_NOW, B_OLD, -np.ones((1, 4)), importance_weights_BL=weights
    )
    check(unclipped, B_RHO)
    loss = policy_gradient_tokens(
        B_NOW, B_OLD, returns, ONES, clip=0.2, importance_weights_BL=weights
    )
    check(loss.mean(), -0.25)


def test_fixture_b_on_policy_distillation():
    check(log_ratio_rewards(B_P, B_OLD), [[-0.5, 1, -1, 0.7]])
    # Before the first update the value is log q - log p, which is a sample of the reverse KL.
    check(sampled_reverse_kl_tokens(B_OLD, B_OLD, B_P), B_OLD - B_P)
    check(
        sampled_reverse_kl_tokens(B_NOW, B_OLD, B_P, coef=2.0),
        2 * (B_OLD - B_P) * np.exp(B_NOW - B_OLD),
    )


def test_low_variance_kl():
    check(low_variance_kl_tokens(np.array([[0.0]]), np.array([[-0.3]])), [[0.040818221]])
    inputs, mask = batch(1)
    got = low_variance_kl_tokens(inputs["now"], inputs["old"], mask)
    d = inputs["old"] - inputs["now"]
    check(got, np.where(mask, np.exp(d) - d - 1, 0), rtol=1e-5)
    assert (got >= 0).all()
    # The value is unbiased; this enumerates all tokens that the student can draw.
    q, reference = jax.nn.log_softmax(A_Q), jax.nn.log_softmax(A_P)
    value = (jnp.exp(q) * low_variance_kl_tokens(q, reference)).sum()
    check(value, reverse_kl_tokens(A_P, A_Q), rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_surrogate_matches_reference(clip, weighted):
    inputs, mask = batch(2)
    weight = inputs["weight"] if weighted else np.ones((3, 5))
    got = jax.jit(functools.partial(policy_gradient_tokens, clip=clip))(
        *(inputs[name] for name in ("now", "old", "advantage")),
        mask,
        importance_weights_BL=inputs["weight"] if weighted else None,
    )
    assert got.dtype == jnp.float32
    token = functools.partial(method_reference.surrogate, clip=clip)
    expected = np.vectorize(lambda n, o, a, w: token(n, o, a, weight=w))(
        inputs["now"], inputs["old"], inputs["advantage"], weight
    )
    check(got, np.where(mask, expected, 0), rtol=1e-5)


def test_surrogate_gradient_matches_finite_differences():
    inputs, _ = batch(3)
    for clip in (None, 0.2):
        slope = jax.grad(
            lambda now, clip=clip: policy_gradient_tokens(
                now, inputs["old"], inputs["advantage"], clip=clip
            ).sum()
        )(jnp.float32(inputs["now"]))
        token = np.vectorize(functools.partial(method_reference.surrogate, clip=clip))
        step = 1e-5
        up, down = (
            token(inputs["now"] + s, inputs["old"], inputs["advantage"]) for s in (step, -step)
        )
        np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-4, atol=1e-5)


def test_clipping_stops_a_token_only_where_it_went_too_far():
    def slope(ratio, advantage, weight=1.0):
        return jax.grad(
            lambda now: policy_gradient_tokens(
                now, jnp.zeros((1, 1)), jnp.array([[advantage]]), clip=0.2,
                importance_weights_BL=jnp.array([[weight]]),
            )[0, 0]
        )(jnp.log(jnp.array([[ratio]])))[0, 0]  # fmt: skip

    assert slope(1.3, 1.0) == 0 and slope(0.7, -1.0) == 0
    check(slope(1.3, -1.0), 1.3)
    check(slope(0.7, 1.0), -0.7)
    # A token that the scorer finds impossible has w = 1.25, so it is clipped before any update.
    weight = mixture_weights(np.array([[-np.inf]]), np.array([[-1.0]]), scorer_share=0.2)
    check(weight, 1.25)
    assert slope(1.0, 1.0, 1.25) == 0 and slope(1.0, -1.0, 1.25) > 0


def test_one_advantage_a_response_is_spread_over_its_tokens():
    inputs, mask = batch(4)
    advantage = np.array([0.5, -2.0, 1.0])
    wide = np.broadcast_to(advantage[:, None], mask.shape)
    run = functools.partial(policy_gradient_tokens, inputs["now"], inputs["old"], clip=0.2)
    np.testing.assert_array_equal(run(advantage, mask_BL=mask), run(wide, mask_BL=mask))


def test_mixture():
    rng = np.random.default_rng(5)
    p, q = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    m = np.asarray(mixture_logps(p, q, scorer_share=0.2))
    check(np.exp(m), 0.2 * np.exp(p) + 0.8 * np.exp(q))
    check(np.exp(m).sum(), 1)
    weight = mixture_weights(p[None], q[None], scorer_share=0.2)[0]
    check(weight, np.exp(q - m), rtol=1e-5)
    check(weight, [method_reference.mixture_weight(*x, 0.2) for x in zip(p, q, strict=True)])
    check(mixture_logps(p, q, scorer_share=0.0), q)
    check(mixture_logps(p, q, scorer_share=1.0), p)
    check(mixture_weights(p, q, scorer_share=0.0), 1)
    # Draws from the mixture give the student's expectation only with the weights.
    f = rng.normal(size=6)
    check((np.exp(m) * weight * f).sum(), (np.exp(q) * f).sum(), rtol=1e-5)
    assert abs((np.exp(m) * f).sum() - (np.exp(q) * f).sum()) > 1e-3
    impossible = np.array([-np.inf, -np.inf, 0.0])
    check(mixture_logps(impossible, np.array([-1.0, -np.inf, -np.inf]), scorer_share=0.2),
          [-1 + np.log(0.8), -np.inf, np.log(0.2)])  # fmt: skip
    check(mixture_weights(impossible, np.array([-1.0, -3.0, -np.inf]), scorer_share=0.2),
          [1.25, 1.25, 0])  # fmt: skip


FIRST_Q, FIRST_P = jnp.array([0.3, -0.2]), jnp.array([0.1, 0.4])
SECOND_Q = jnp.array([[0.5, 0], [-0.4, 0.1]])
SECOND_P = jnp.array([[0, 0.2], [0.3, -0.3]])
SEQUENCES = list(itertools.product(range(2), repeat=2))


def sequence_logps(first, second):
    """The log-probs of both tokens of every sequence: [4, 2]."""
    first, second = jax.nn.log_softmax(first), jax.nn.log_softmax(second)
    return jnp.stack([jnp.stack([first[a], second[a, b]]) for a, b in SEQUENCES])


@pytest.mark.parametrize(
    ("include_current", "expected"), [(False, 0.167244431), (True, 0.355247400)]
)
def test_minillm_gradient_is_that_of_the_sequence_kl(include_current, expected):
    """All four sequences of two tokens from two, each weighted by its probability.

    With R_t in place of R_{t+1} a token's own reward would count twice.
    """
    old, scorer = sequence_logps(FIRST_Q, SECOND_Q), sequence_logps(FIRST_P, SECOND_P)
    probability = jnp.exp(old.sum(axis=1, keepdims=True))
    mask = jnp.ones_like(old)
    check((probability[:, 0] * (old - scorer).sum(axis=1)).sum(), 0.171378372, rtol=1e-5)
    returns = rewards_to_go(
        log_ratio_rewards(scorer, old), mask, include_current=include_current,
        length_normalize=False,
    )  # fmt: skip

    def policy(first):
        now = sequence_logps(first, SECOND_Q)
        return (probability * policy_gradient_tokens(now, old, returns, mask)).sum()

    def single(first):
        logits_q = jnp.stack([jnp.stack([first, SECOND_Q[a]]) for a, _ in SEQUENCES])
        logits_p = jnp.stack([jnp.stack([FIRST_P, SECOND_P[a]]) for a, _ in SEQUENCES])
        return (probability * single_step_kl_tokens(logits_p, logits_q)).sum()

    single_part, long_part = jax.grad(single)(FIRST_Q), jax.grad(policy)(FIRST_Q)
    check(np.abs(single_part), 0.188002970, rtol=1e-5)
    total = single_part + long_part
    check(np.abs(total), expected, rtol=1e-5)
    check(total.sum(), 0, atol=1e-6)
    if include_current:
        return
    check(np.abs(long_part), 0.020758539, rtol=1e-5)
    assert single_part[0] * long_part[0] < 0

    def sequence_kl(first):
        now = sequence_logps(first, SECOND_Q)
        return (jnp.exp(now.sum(axis=1)) * (now - scorer).sum(axis=1)).sum()

    check(total, jax.grad(sequence_kl)(FIRST_Q), rtol=1e-5)


def test_sampled_gradient_is_that_of_the_full_reverse_kl():
    """On-policy distillation at position 0 of fixture A, with all tokens enumerated."""
    p, old = jax.nn.log_softmax(A_P), jax.nn.log_softmax(A_Q)

    def expected(q_logits, coef):
        now = jax.nn.log_softmax(q_logits)
        return (jnp.exp(old) * sampled_reverse_kl_tokens(now, old, p, coef=coef)).sum()

    full = jax.grad(lambda q: reverse_kl_tokens(A_P, q))(A_Q)
    check(jax.grad(expected)(A_Q, 1.0), [-0.243965631, 0.178353167, 0.065612464], rtol=1e-5)
    check(jax.grad(expected)(A_Q, 3.0), 3 * full, rtol=1e-5)
    check(expected(A_Q, 1.0), reverse_kl_tokens(A_P, A_Q), rtol=1e-5)


def test_a_student_that_equals_the_scorer_is_left_alone_by_every_sample():
    """This holds for every sample; centred or whitened rewards would add noise."""
    rng = np.random.default_rng(6)
    logps = -rng.uniform(0.1, 3, size=(2, 4))
    slope = jax.grad(lambda now: sampled_reverse_kl_tokens(now, logps, logps).sum())(
        jnp.float32(logps)
    )
    assert (np.asarray(slope) == 0).all()


def test_single_step_kl():
    rng = np.random.default_rng(7)
    p, q = rng.normal(size=(2, 3, 5, 6))
    inputs, mask = batch(7)
    plain = reverse_kl_tokens(p, q, mask)
    np.testing.assert_array_equal(single_step_kl_tokens(p, q, mask), plain)
    weighted = jax.jit(single_step_kl_tokens)(p, q, mask, importance_weights_BL=inputs["weight"])
    check(weighted, np.where(mask, inputs["weight"] * plain, 0), rtol=1e-5)

    def loss(p, q, weight):
        return single_step_kl_tokens(p, q, mask, importance_weights_BL=weight).sum()

    inside = mask != 0
    spoilt = (
        jnp.float32(np.where(inside[..., None], p, np.nan)),
        jnp.float32(np.where(inside[..., None], q, np.inf)),
        jnp.float32(np.where(inside, inputs["weight"], np.nan)),
    )
    value, (to_p, to_q, to_weight) = jax.value_and_grad(loss, argnums=(0, 1, 2))(*spoilt)
    check(value, weighted.sum())
    assert (np.asarray(to_p) == 0).all() and (np.asarray(to_weight) == 0).all()
    clean = jax.grad(loss, argnums=1)(p, jnp.float32(q), inputs["weight"])
    np.testing.assert_array_equal(to_q, clean)
    assert (np.asarray(to_q)[~inside] == 0).all() and (np.asarray(to_q)[inside] != 0).any()


@every_loss
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask_and_only_the_policy_learns(name, bad):
    inputs, mask = batch(8)

    def run(values):
        values = {key: jnp.float32(value) for key, value in values.items()}
        return jax.jit(jax.value_and_grad(lambda x: LOSSES[name](x, mask).sum()))(values)

    value, slopes = run({key: np.where(mask, x, bad) for key, x in inputs.items()})
    clean_value, clean_slopes = run(inputs)
    assert value == clean_value
    for key, slope in slopes.items():
        np.testing.assert_array_equal(slope, clean_slopes[key], err_msg=key)
        assert (np.asarray(slope)[mask == 0] == 0).all()
        assert (np.asarray(slope) != 0).any() == (key == "now"), key
    tokens = LOSSES[name](inputs, mask)
    assert tokens.dtype == jnp.float32 and (np.asarray(tokens)[mask == 0] == 0).all()


@every_loss
def test_padding_changes_nothing(name):
    inputs, mask = batch(9)
    wide = {key: np.pad(x, ((0, 0), (2, 3)), constant_values=np.nan) for key, x in inputs.items()}
    got = LOSSES[name](wide, np.pad(mask, ((0, 0), (2, 3))))[:, 2:-3]
    check(got, LOSSES[name](inputs, mask))


@every_loss
@pytest.mark.parametrize("values", [
    (-np.inf, -1, -1), (-1, -np.inf, -1), (-1, -1, -np.inf), (-np.inf,) * 3, (0, 0, 0),
])  # fmt: skip
def test_impossible_tokens_give_no_nan(name, values):
    inputs = {key: jnp.array([[v]]) for key, v in zip(TOKEN_INPUTS, values, strict=False)}
    inputs = {key: jnp.float32(x) for key, x in inputs.items()} | {
        "advantage": jnp.zeros((1, 1)),
        "weight": jnp.ones((1, 1)),
    }
    value, slope = jax.value_and_grad(
        lambda now: LOSSES[name](inputs | {"now": now}, jnp.ones((1, 1))).sum()
    )(inputs["now"])
    assert not np.isnan(value)
    assert not np.isnan(slope).any()


def test_an_overflown_ratio_is_stopped_by_clipping():
    far, old = jnp.array([[-1.0]]), jnp.array([[-500.0]])

    def slope(advantage, clip):
        return jax.grad(
            lambda now: policy_gradient_tokens(now, old, jnp.array([[advantage]]), clip=clip).sum()
        )(far)

    assert slope(1.0, 0.2) == 0 and slope(0.0, None) == 0 and slope(0.0, 0.2) == 0


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="clip is 0"):
        policy_gradient_tokens(B_NOW, B_OLD, B_P, clip=0)
    with pytest.raises(ValueError, match="scorer_share is 1;"):
        mixture_weights(B_P, B_OLD, scorer_share=1)
    with pytest.raises(ValueError, match=r"scorer_share is -0\.1"):
        mixture_logps(B_P, B_OLD, scorer_share=-0.1)
    with pytest.raises(ValueError, match="scale is 0"):
        sampled_reverse_kl_tokens(B_NOW, B_OLD, B_P, coef=0)
    for wrong in ((B_NOW, B_OLD[:, :2], B_P), (B_NOW, B_OLD, B_P[:, :2])):
        with pytest.raises(AssertionError):
            policy_gradient_tokens(*wrong)
