"""Rewards, returns, whitening and group advantages: fixture B, properties, edges."""

import functools

import jax
import jax.numpy as jnp
import method_reference
import numpy as np
import pytest

from proxykd_jax.losses import group_advantages, log_ratio_rewards, rewards_to_go, whiten

B_P, B_OLD = np.array([[-1, -0.5, -2, -0.2]]), np.array([[-0.5, -1.5, -1, -0.9]])
B_REWARDS = [[-0.5, 1, -1, 0.7]]
ONES = np.ones((1, 4))
D = [[0.2, 1, -0.5, 2.1]]
check = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1], [0] * 6])
    return rng.normal(size=(4, 6)), mask


def both_returns(discount=1.0, normalize=True):
    for include_current in (False, True):
        yield functools.partial(
            rewards_to_go,
            include_current=include_current,
            discount=discount,
            length_normalize=normalize,
        )


def test_fixture_b():
    check(log_ratio_rewards(B_P, B_OLD), B_REWARDS)
    check(rewards_to_go(B_REWARDS, ONES, include_current=False), [[0.233333333, -0.15, 0.7, 0]])
    check(rewards_to_go(B_REWARDS, ONES, include_current=True), [[0.05, 0.233333333, -0.15, 0.7]])
    check(
        rewards_to_go(B_REWARDS, ONES, include_current=True, discount=0.95),
        [[0.036915625, 0.22725, -0.1675, 0.7]],
    )
    check(rewards_to_go(B_REWARDS, ONES, include_current=True, discount=0.0,
                        length_normalize=False), B_REWARDS)  # fmt: skip


@pytest.mark.parametrize("include_current", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.95, 0.0])
@pytest.mark.parametrize("normalize", [False, True])
def test_returns_match_reference(include_current, discount, normalize):
    rewards, mask = batch()
    options = {
        "include_current": include_current,
        "discount": discount,
        "length_normalize": normalize,
    }
    got = jax.jit(functools.partial(rewards_to_go, **options))(rewards, mask)
    assert got.dtype == jnp.float32
    expected = method_reference.returns(rewards, mask, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_reward_gives_one_return_at_every_position_and_length():
    mask = np.tril(np.ones((5, 5)))
    got = np.asarray(rewards_to_go(0.3 * mask, mask, include_current=True))
    check(got[mask == 1], 0.3)
    got = np.asarray(rewards_to_go(0.3 * mask, mask, include_current=False))
    has_next = np.pad(mask[:, 1:], ((0, 0), (0, 1))) == 1
    check(got[has_next], 0.3)
    assert (got[~has_next] == 0).all()
    # Without the division a longer answer has a larger return.
    plain = rewards_to_go(0.3 * mask, mask, include_current=True, length_normalize=False)
    check(plain[:, 0], 0.3 * np.arange(1, 6))


@pytest.mark.parametrize("where", ["left", "right"])
def test_padding_changes_no_return(where):
    rewards, mask = batch(1)
    pads = ((0, 0), (3, 0) if where == "left" else (0, 3))
    here = slice(3, None) if where == "left" else slice(0, 6)
    for function in both_returns(0.9):
        padded = function(np.pad(rewards, pads, constant_values=np.nan), np.pad(mask, pads))
        np.testing.assert_allclose(padded[:, here], function(rewards, mask), rtol=1e-6, atol=1e-7)


def test_rewards_are_scaled_and_then_clipped():
    check(log_ratio_rewards(B_P, B_OLD, scale=2.0, clip=1.5), [[-1, 1.5, -1.5, 1.4]])
    impossible = np.array([[-np.inf, -1.0]])
    check(log_ratio_rewards(impossible, np.array([[-1.0, -1.0]]), clip=100.0), [[-100, 0]])
    got = log_ratio_rewards(impossible, impossible)
    check(got, 0)
    assert np.isfinite(log_ratio_rewards(impossible, np.array([[-1.0, -1.0]]))).all()


@pytest.mark.parametrize("include_padding", [False, True])
def test_whitening(include_padding):
    values, mask = batch(2)
    got = jax.jit(functools.partial(whiten, include_padding=include_padding))(values, mask)
    check(got, method_reference.whiten(values, mask, include_padding), rtol=1e-5, atol=1e-6)


def test_only_whitening_over_padding_depends_on_padding():
    values, mask = batch(3)
    values = values + 2.0
    pads = ((0, 0), (0, 4))
    wide = np.pad(values, pads), np.pad(mask, pads)
    check(whiten(*wide)[:, :6], whiten(values, mask), rtol=1e-5)
    inside = np.asarray(whiten(values, mask))[mask == 1]
    check([inside.mean(), inside.var()], [0, 1], atol=1e-6)
    change = whiten(*wide, include_padding=True)[:, :6] - whiten(values, mask, include_padding=True)
    assert np.abs(change).max() > 0.1
    # All rewards are above 0. With padding in the mean, advantages compare with a reward of zero.
    assert (np.asarray(whiten(values, mask, include_padding=True))[mask == 1] > 0).mean() > 0.5


def test_whitening_undoes_a_scale_but_not_a_clip():
    mask = np.ones((1, 4))
    once, twice = (log_ratio_rewards(B_P, B_OLD, scale=scale) for scale in (1.0, 2.0))
    check(whiten(once, mask), whiten(twice, mask), rtol=1e-5)
    clipped = log_ratio_rewards(B_P, B_OLD, scale=2.0, clip=1.0)
    assert np.abs(whiten(clipped, mask) - whiten(once, mask)).max() > 0.1


def test_group_advantages():
    expected = {
        1: [[-0.447810674, 0.268686405, -1.074745619, 1.253869888]],
        0: [[-0.517087155, 0.310252293, -1.241009173, 1.447844035]],
    }
    for ddof, values in expected.items():
        got = jax.jit(functools.partial(group_advantages, ddof=ddof))(jnp.array(D))
        check(got, values, rtol=2e-6)
        check(got[0], method_reference.group_advantages(D[0], ddof), rtol=2e-6)
    # Dropped samples do not count, and each prompt is normalised by itself.
    two = group_advantages(np.array([D[0] + [np.nan], [5.0, 1, 2, 3, 4]]),
                           np.array([[1, 1, 1, 1, 0], [1] * 5]))  # fmt: skip
    check(two[0], expected[1][0] + [0], rtol=2e-6)
    check(two[1], method_reference.group_advantages([5.0, 1, 2, 3, 4], 1), rtol=2e-6)


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_equal_rewards_teaches_nothing(ddof):
    rewards = np.full((3, 7), np.float32(0.1) * np.array([[1], [1e4], [-3.3]], np.float32))
    assert (np.asarray(group_advantages(rewards, ddof=ddof)) == 0).all()
    alone = group_advantages(np.array([[3.0, np.inf], [1, 2]]), np.array([[1, 0], [0, 0]]))
    assert (np.asarray(alone) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask_and_nothing_has_a_gradient(bad):
    values, mask = batch(4)
    other = np.random.default_rng(5).normal(size=values.shape)
    functions = {
        "rewards": lambda x: log_ratio_rewards(x, other, mask) + log_ratio_rewards(other, x, mask),
        "whiten": lambda x: whiten(x, mask),
        "padding": lambda x: whiten(x, mask, include_padding=True),
        "group": lambda x: group_advantages(x, mask),
    }
    for number, function in enumerate(both_returns(0.9)):
        functions[f"returns {number}"] = lambda x, function=function: function(x, mask)
    for name, function in functions.items():
        spoiled = np.where(mask, values, bad)
        np.testing.assert_array_equal(function(spoiled), function(values), err_msg=name)
        assert (np.asarray(function(spoiled))[mask == 0] == 0).all(), name
        slope = jax.grad(lambda x, f=function: f(x).sum())(jnp.float32(spoiled))
        assert (np.asarray(slope) == 0).all(), name


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"discount is 1\.5"):
        rewards_to_go(B_REWARDS, ONES, include_current=True, discount=1.5)
    with pytest.raises(ValueError, match="scale is 0"):
        log_ratio_rewards(B_P, B_OLD, scale=0)
    with pytest.raises(ValueError, match="clip is -1"):
        log_ratio_rewards(B_P, B_OLD, clip=-1)
    with pytest.raises(ValueError, match="ddof is 2"):
        group_advantages(np.array(D), ddof=2)
    with pytest.raises(AssertionError):
        rewards_to_go(np.zeros((1, 3)), ONES, include_current=True)
    with pytest.raises(AssertionError):
        log_ratio_rewards(B_P, B_OLD[:, :3])
