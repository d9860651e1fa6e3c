"""Drawn soft labels: the draws, their loss, and that its gradient is unbiased."""

import functools

import jax
import jax.numpy as jnp
import method_reference
import numpy as np
import pytest
import reference

import proxykd_jax.losses as losses
from proxykd_jax.losses import (
    DrawnLabels,
    drawn_label_tokens,
    forward_kl_tokens,
    reduce_tokens,
    topk_kl_tokens,
    topk_logps,
)

P = np.array([0.5, 0.3, 0.1, 0.06, 0.04])
Q_LOGITS = np.array([2, 1.5, 0, -1, -2])
COUNTS, IDS = np.array([30, 15, 4, 1, 0]), np.arange(5)
FULL_GRADIENT = [0.052495757, 0.035105616, -0.025227830, -0.032492856, -0.029880687]
KEY = jax.random.key(0)
# This is compiled, because operation by operation it takes seconds.
draw_labels = jax.jit(losses.draw_labels, static_argnames=("num_draws", "proposal_power"))


def drawn_label_loss(student, ids, counts, mask, *, reduction="mean", **options):
    return reduce_tokens(
        drawn_label_tokens(student, ids, counts, mask, **options), mask, reduction=reduction
    )


loss_tokens = jax.jit(drawn_label_tokens, static_argnames=("num_draws", "value"))
check = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)


def rows(batch=3, length=4, vocab=37, seed=0):
    logits = np.random.default_rng(seed).normal(scale=2, size=(batch, length, vocab))
    return logits, np.arange(batch, dtype=np.uint32) + 7


def targets_BLV(drawn, num_draws, vocab):
    """The targets over the whole vocabulary."""
    share = np.asarray(drawn.counts_BLK) / num_draws * np.asarray(drawn.weights_BLK)
    one_hot = np.asarray(drawn.ids_BLK)[..., None] == np.arange(vocab)
    return (share[..., None] * one_hot).sum(axis=-2)


@functools.partial(jax.jit, static_argnames=("num_rows", "num_draws", "proposal_power"))
def many(num_rows, num_draws, proposal_power=1.0):
    """Draws for one position of P, for many rows."""
    logits = jnp.broadcast_to(jnp.log(jnp.float32(P)), (num_rows, 1, 5))
    return draw_labels(
        logits,
        KEY,
        num_draws=num_draws,
        row_ids_B=jnp.arange(num_rows, dtype=jnp.uint32),
        proposal_power=proposal_power,
    )


def test_check_case():
    def loss(q, value):
        return drawn_label_tokens(q, IDS, COUNTS, num_draws=50, value=value)

    q = jnp.float32(Q_LOGITS)
    for value, expected in (("kl", 0.015323558), ("cross_entropy", 0.963309525)):
        got, slope = jax.value_and_grad(loss)(q, value)
        check(got, expected, rtol=1e-5)
        check(slope, [-0.047504243, 0.035105616, -0.005227830, 0.007507144, 0.010119313])
    check(jax.grad(lambda q: forward_kl_tokens(np.log(P), q))(q), FULL_GRADIENT)


def test_top_k_has_another_optimum():
    """Without the tail, the optimum of top 2 is p / kept mass at the ids, and 0 elsewhere."""
    logps = np.log(P[:2])

    def loss(q):
        return topk_kl_tokens(topk_logps(q, np.arange(2)), (logps, None), tail="zero")

    descend = jax.jit(
        lambda q: jax.lax.fori_loop(0, 3000, lambda _, q: q - 2.0 * jax.grad(loss)(q), q)
    )
    found = jax.nn.softmax(descend(jnp.float32(Q_LOGITS)))
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0, 0], atol=1e-3)


@pytest.mark.parametrize("value", ["kl", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("power", [1.0, 0.8])
def test_loss_matches_reference(value, reduction, power):
    logits, row_ids = rows()
    student = np.random.default_rng(1).normal(size=logits.shape)
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    drawn = draw_labels(
        logits, KEY, num_draws=20, row_ids_B=row_ids, mask_BL=mask, proposal_power=power
    )
    got = jax.jit(
        functools.partial(drawn_label_loss, num_draws=20, value=value, reduction=reduction)
    )(student, drawn.ids_BLK, drawn.counts_BLK, mask, weights_BLK=drawn.weights_BLK)
    assert got.dtype == jnp.float32 and got.shape == (3,)
    logps, ids = reference.log_softmax(student), np.asarray(drawn.ids_BLK)
    targets = np.asarray(drawn.counts_BLK, np.float64) / 20 * np.asarray(drawn.weights_BLK)
    positions = np.array([
        [method_reference.drawn_label(logps[b, t], ids[b, t], targets[b, t]) for t in range(4)]
        for b in range(3)
    ])[..., 0 if value == "kl" else 1]  # fmt: skip
    check(got, reference.per_example(positions, mask, reduction), rtol=1e-5)


@pytest.mark.parametrize("vocab", [1, 2, 5, 37, 49])
def test_counts_are_of_distinct_ids_inside_the_vocabulary(vocab):
    logits, row_ids = rows(vocab=vocab)
    logits[..., : vocab // 3] = -np.inf
    drawn = draw_labels(logits, KEY, num_draws=30, row_ids_B=row_ids)
    assert isinstance(drawn, DrawnLabels)
    ids, counts = np.asarray(drawn.ids_BLK), np.asarray(drawn.counts_BLK)
    assert ids.dtype == counts.dtype == np.int32
    assert (counts.sum(-1) == 30).all() and (np.diff(counts, axis=-1) <= 0).all()
    assert (ids[counts == 0] == 0).all()
    assert (ids[counts > 0] >= vocab // 3).all() and (ids < vocab).all()
    for b, t in np.ndindex(3, 4):
        kept = ids[b, t][counts[b, t] > 0]
        assert len(set(kept)) == len(kept)
    assert (np.asarray(drawn.weights_BLK) == 1).all()


def test_a_draw_depends_on_row_and_position_alone():
    logits, row_ids = rows()
    draw = functools.partial(draw_labels, num_draws=25)
    whole = draw(logits, KEY, row_ids_B=row_ids)
    # Draws stay the same in another batch order, with more padding, and for a part of the row.
    turned = draw(logits[::-1], KEY, row_ids_B=row_ids[::-1])
    wide = draw(
        np.pad(logits, ((0, 0), (2, 5), (0, 0)), constant_values=np.nan),
        KEY,
        row_ids_B=row_ids,
        positions_BL=np.broadcast_to(np.arange(-2, 9), (3, 11)),
        mask_BL=np.pad(np.ones((3, 4)), ((0, 0), (2, 5))),
    )
    part = draw(logits[:, 2:], KEY, row_ids_B=row_ids, positions_BL=np.broadcast_to([2, 3], (3, 2)))
    for field, values in whole._asdict().items():
        np.testing.assert_array_equal(getattr(turned, field)[::-1], values)
        np.testing.assert_array_equal(getattr(wide, field)[:, 2:6], values)
        np.testing.assert_array_equal(getattr(part, field), values[:, 2:])
    assert (np.asarray(wide.counts_BLK)[:, [0, 1, 6, 10]] == 0).all()
    # All positions have the same distribution, so draws differ only by row, position and key.
    flat = np.zeros((2, 2, 37))
    seen = draw(flat, KEY, row_ids_B=np.array([1, 2], np.uint32)).counts_BLK
    again = draw(flat, jax.random.key(1), row_ids_B=np.array([1, 2], np.uint32)).counts_BLK
    ids = draw(flat, KEY, row_ids_B=np.array([1, 2], np.uint32)).ids_BLK.reshape(4, -1)
    assert len({tuple(x) for x in np.asarray(ids).tolist()}) == 4
    assert not np.array_equal(seen, again)


def test_targets_are_unbiased_and_have_the_multinomial_variance():
    num_rows, num_draws = 6_000, 10
    targets = targets_BLV(many(num_rows, num_draws), num_draws, 5)[:, 0]
    variance = P * (1 - P) / num_draws
    error = np.abs(targets.mean(0) - P) / np.sqrt(variance / num_rows)
    assert (error < 4).all(), error
    np.testing.assert_allclose(targets.var(0), variance, rtol=0.06)
    # Without replacement there could be neither 10 draws of 5 ids nor 3 of one id.
    assert targets.max() > 0.9


@pytest.mark.parametrize("power", [0.8, 1.2])
def test_weighted_targets_are_unbiased_and_not_renormalised(power):
    num_rows, num_draws = 6_000, 10
    drawn = many(num_rows, num_draws, power)
    targets = targets_BLV(drawn, num_draws, 5)[:, 0]
    spread = targets.std(0) / np.sqrt(num_rows)
    assert (np.abs(targets.mean(0) - P) < 4 * spread).all()
    assert np.ptp(targets.sum(-1)) > 0.05
    # Without weights the draws follow p^power.
    bare = targets_BLV(drawn._replace(weights_BLK=np.ones(drawn.ids_BLK.shape)), 10, 5)[:, 0]
    np.testing.assert_allclose(bare.mean(0), P**power / (P**power).sum(), atol=0.006)


def test_gradient_is_unbiased_for_the_full_kl_and_its_error_falls_with_the_root_of_the_draws():
    def error(num_rows, num_draws):
        drawn = many(num_rows, num_draws)
        q = jnp.float32(Q_LOGITS)

        def loss(q):
            logits = jnp.broadcast_to(q, (num_rows, 1, 5))
            return drawn_label_tokens(
                logits, drawn.ids_BLK, drawn.counts_BLK, num_draws=num_draws
            ).mean()

        return np.linalg.norm(jax.jit(jax.grad(loss))(q) - np.array(FULL_GRADIENT))

    expected = np.sqrt((P * (1 - P)).sum())
    for num_rows, num_draws in ((100, 10), (6_000, 10)):
        assert error(num_rows, num_draws) < 2.5 * expected / np.sqrt(num_rows * num_draws)
    # The top 2 of the same model have a far larger error, with any number of rows.
    for tail in ("zero", "renormalize"):
        slope = jax.grad(
            lambda q, tail=tail: topk_kl_tokens(
                topk_logps(q, np.arange(2)), (np.log(P[:2]), None), tail=tail
            )
        )(jnp.float32(Q_LOGITS))
        assert np.linalg.norm(slope - np.array(FULL_GRADIENT)) > 0.05


def test_values_cross_entropy_is_unbiased_and_kl_is_not():
    num_rows, num_draws = 6_000, 10
    drawn = many(num_rows, num_draws)
    logits = jnp.broadcast_to(jnp.float32(Q_LOGITS), (num_rows, 1, 5))
    kl, cross_entropy = (
        loss_tokens(
            logits, drawn.ids_BLK, drawn.counts_BLK, num_draws=num_draws, value=value
        ).mean()
        for value in ("kl", "cross_entropy")
    )
    true_kl = forward_kl_tokens(np.log(P), Q_LOGITS)
    entropy = -(P * np.log(P)).sum()
    np.testing.assert_allclose(cross_entropy, true_kl + entropy, atol=0.01)
    assert kl > true_kl + 0.1


def test_rare_ids_are_drawn_as_often_as_they_should():
    """A probability of 5e-8 is less than one step of a uniform float32 number."""
    vocab, num_draws, num_rows, tail = 16384, 8192, 8, 5e-8
    logps = np.full(vocab, np.log(tail))
    logps[3] = np.log(1 - tail * (vocab - 1))
    drawn = draw_labels(
        np.broadcast_to(logps, (num_rows, 1, vocab)),
        KEY,
        num_draws=num_draws,
        row_ids_B=np.arange(num_rows, dtype=np.uint32),
    )
    counts, ids = np.asarray(drawn.counts_BLK), np.asarray(drawn.ids_BLK)
    rare = (counts > 0) & (ids != 3)
    expected = num_rows * num_draws * tail * (vocab - 1)  # 54
    assert abs(counts[rare].sum() - expected) < 4 * np.sqrt(expected)
    # The draws are spread over the tail and do not pile up on a few ids.
    assert len(set(ids[rare])) > 0.9 * counts[rare].sum()
    assert np.ptp(ids[rare]) > 0.8 * vocab


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_through_the_mask_and_targets_are_constant(bad):
    logits, row_ids = rows(seed=2)
    student = np.random.default_rng(3).normal(size=logits.shape)
    mask = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    inside = (mask != 0)[..., None]
    draw = functools.partial(
        draw_labels, num_draws=9, row_ids_B=row_ids, mask_BL=mask, proposal_power=0.9
    )
    drawn = draw(logits, KEY)
    for got, want in zip(draw(np.where(inside, logits, bad), KEY), drawn, strict=True):
        np.testing.assert_array_equal(got, want)

    def loss(student, counts, weights, ids):
        return drawn_label_loss(
            student, ids, counts, mask, num_draws=9, weights_BLK=weights
        ).sum()  # fmt: skip

    def run(student, counts, weights, ids):
        arrays = (jnp.float32(x) for x in (student, counts, weights))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*arrays, ids)

    value, slopes = run(
        np.where(inside, student, bad),
        np.where(inside, drawn.counts_BLK, bad),
        np.where(inside, drawn.weights_BLK, bad),
        np.where(inside, drawn.ids_BLK, 10**6),
    )
    clean_value, clean = run(student, drawn.counts_BLK, drawn.weights_BLK, drawn.ids_BLK)
    assert value == clean_value
    np.testing.assert_array_equal(slopes[0], clean[0])
    assert (np.asarray(slopes[0])[mask == 0] == 0).all()
    assert (np.asarray(slopes[1]) == 0).all() and (np.asarray(slopes[2]) == 0).all()
    # Slots without a count may hold any id and weight.
    spoilt = np.where(np.asarray(drawn.counts_BLK) > 0, drawn.weights_BLK, np.nan)
    ids = np.where(np.asarray(drawn.counts_BLK) > 0, drawn.ids_BLK, 10**6)
    assert run(student, drawn.counts_BLK, spoilt, ids)[0] == clean_value


def test_impossible_ids_and_broken_scorers():
    labels = np.array([0, 1]), np.array([3, 1])
    q = jnp.array([0.0, -jnp.inf, 1.0])
    value, slope = jax.value_and_grad(lambda q: loss_tokens(q, *labels, num_draws=4))(q)
    assert value == np.inf and np.isfinite(slope).all() and slope[1] < 0
    broken = draw_labels(
        np.array([[[0.0, np.nan, 1.0], [0, 1, 2]]]),
        KEY,
        num_draws=2,
        row_ids_B=np.zeros(1, np.uint32),
    )
    got = loss_tokens(
        np.zeros((1, 2, 3)),
        broken.ids_BLK,
        broken.counts_BLK,
        num_draws=2,
        weights_BLK=broken.weights_BLK,
    )
    assert np.isnan(got[0, 0]) and np.isfinite(got[0, 1])


def test_mistakes_are_refused():
    draw = functools.partial(
        draw_labels, np.zeros((1, 1, 3)), KEY, row_ids_B=np.zeros(1, np.uint32)
    )
    with pytest.raises(ValueError, match="num_draws is 0"):
        draw(num_draws=0)
    with pytest.raises(ValueError, match="proposal_power is 0"):
        draw(num_draws=1, proposal_power=0)
    with pytest.raises(ValueError, match="forward KL alone"):
        drawn_label_tokens(Q_LOGITS, IDS, COUNTS, num_draws=50, value="reverse_kl")
    with pytest.raises(ValueError, match="num_draws is 0"):
        drawn_label_tokens(Q_LOGITS, IDS, COUNTS, num_draws=0)
    with pytest.raises(AssertionError):
        draw_labels(np.zeros((1, 1, 3)), KEY, num_draws=1, row_ids_B=np.zeros(2, np.uint32))
    with pytest.raises(AssertionError):
        drawn_label_tokens(Q_LOGITS, IDS, COUNTS[:4], num_draws=50)
