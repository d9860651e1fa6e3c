"""Reductions: token, example and batch; packed rows give what separate rows give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from proxykd_jax.losses import (
    BATCH_REDUCTIONS,
    batch_count,
    batch_mean,
    batch_terms,
    count_tokens,
    example_terms,
    reduce_examples,
    reduce_tokens,
    token_reduction,
    weighted_kl,
)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(4, 6)).astype(np.float32)
    mask = rng.random((4, 6)) < 0.5
    mask[2] = False
    mask[0, 0] = True
    return values, mask


def packed(seed=0):
    """Two packed rows with five examples, and the same five examples in separate rows."""
    values, mask = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32), None
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 2, 2, 2, 2, 2, 0]])
    mask = np.array([[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 1, 1, 0]])
    rows, row_masks = np.zeros((5, 8), np.float32), np.zeros((5, 8), int)
    owners = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]
    for i, (row, segment) in enumerate(owners):
        picked = segments[row] == segment
        rows[i, : picked.sum()], row_masks[i, : picked.sum()] = (
            values[row, picked],
            mask[row, picked],
        )
    return values, mask, segments, rows, row_masks, owners


def weighted_terms(values, mask, weight, reduction, **segments):
    value = reduce_tokens(values, mask, reduction=token_reduction(reduction), **segments)
    return example_terms(weighted_kl(value, weight), mask, reduction=reduction, **segments)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_matches_reference(reduction):
    values, mask = batch()
    got = jax.jit(functools.partial(reduce_tokens, reduction=reduction))(values, mask)
    np.testing.assert_allclose(got, reference.per_example(values, mask, reduction), rtol=1e-6)
    assert got[2] == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_segments_equal_separate_rows(reduction):
    values, mask, segments, rows, row_masks, owners = packed()
    got = reduce_tokens(values, mask, reduction=reduction, segment_ids_BL=segments, num_segments=4)
    assert got.shape == (2, 4)
    alone = reduce_tokens(rows, row_masks, reduction=reduction)
    for i, (row, segment) in enumerate(owners):
        np.testing.assert_allclose(got[row, segment - 1], alone[i], rtol=1e-6)
    assert (np.asarray(got)[:, 3] == 0).all() and got[1, 2] == 0
    tokens = count_tokens(mask, segment_ids_BL=segments, num_segments=4)
    np.testing.assert_array_equal(tokens, [[2, 1, 0, 0], [1, 3, 0, 0]])


@pytest.mark.parametrize("reduction", BATCH_REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_packed_batches_equal_padded_ones(reduction, weighted):
    values, mask, segments, rows, row_masks, owners = packed(1)
    weight = np.arange(1.0, 6.0) if weighted else np.ones(5)
    weight_BS = np.zeros((2, 4))
    for i, (row, segment) in enumerate(owners):
        weight_BS[row, segment - 1] = weight[i]
    padded = weighted_terms(rows, row_masks, weight, reduction)
    segments = {"segment_ids_BL": segments, "num_segments": 4}
    got = weighted_terms(values, mask, weight_BS, reduction, **segments)
    if not weighted:
        assert got == batch_terms(values, mask, reduction=reduction, **segments)
    np.testing.assert_allclose(got.total, padded.total, rtol=1e-6)
    np.testing.assert_array_equal(got.divisor, padded.divisor)


def test_batch_terms_are_what_the_table_says():
    values, mask = batch(1)
    weight = np.array([2.0, 0.5, 7.0, 1.0])
    sums, means = (reference.per_example(values, mask, r) for r in ("sum", "mean"))
    valid = mask.any(axis=1).sum()
    for reduction, total, divisor in (
        ("example_mean", (weight * means).sum(), valid),
        ("token_mean", (weight * sums).sum(), mask.sum()),
        ("sum", (weight * sums).sum(), valid),
    ):
        got = jax.jit(functools.partial(weighted_terms, reduction=reduction))(values, mask, weight)
        np.testing.assert_allclose(got.total, total, atol=1e-6)
        assert got.divisor == divisor == batch_count(mask, reduction=reduction)
        assert valid == 3


@pytest.mark.parametrize("reduction", BATCH_REDUCTIONS)
def test_parts_of_a_batch_add_up(reduction):
    """The parts are unequal, so the mean of their means would be another number."""
    values, mask = batch(2)
    mask[3] = [0, 0, 0, 0, 0, 1]
    whole = batch_terms(values, mask, reduction=reduction)
    first = batch_terms(values[:3], mask[:3], reduction=reduction)
    last = batch_terms(values[3:], mask[3:], reduction=reduction)
    added = (first.total + last.total, first.divisor + last.divisor)
    np.testing.assert_allclose(batch_mean(added), batch_mean(whole), rtol=1e-6)
    wrong = (batch_mean(first) + batch_mean(last)) / 2
    assert abs(wrong - batch_mean(whole)) > 1e-3


@pytest.mark.parametrize("reduction", BATCH_REDUCTIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_through_the_mask(reduction, bad):
    values, mask = batch(3)

    def mean(v):
        return batch_mean(batch_terms(v, mask, reduction=reduction))

    value, grad = jax.value_and_grad(mean)(jnp.asarray(np.where(mask, values, bad)))
    clean_value, clean_grad = jax.value_and_grad(mean)(jnp.asarray(values))
    assert value == clean_value
    np.testing.assert_array_equal(grad, clean_grad)
    assert (np.asarray(grad)[~mask] == 0).all()


@pytest.mark.parametrize("reduction", BATCH_REDUCTIONS)
def test_an_empty_batch_is_zero(reduction):
    values, mask = batch()
    value, grad = jax.value_and_grad(
        lambda v: batch_mean(batch_terms(v, 0 * mask, reduction=reduction))
    )(jnp.asarray(values))
    assert value == 0 and (np.asarray(grad) == 0).all()


def test_reduce_examples():
    term = reduce_examples(np.array([1.0, np.nan, 3.0]), np.array([1, 0, 1]))
    assert (term.total, term.divisor) == (4, 2)
    assert batch_mean((jnp.float32(4), jnp.float32(0))) == 0
    # A ratio's divisor may be below 1 or negative.
    np.testing.assert_allclose(batch_mean((0.2, 0.1)), 2, rtol=1e-6)


def test_a_segment_too_many_is_loud():
    values, mask, segments, *_ = packed()
    got = reduce_tokens(values, mask, segment_ids_BL=segments, num_segments=1)
    assert np.isnan(got).all()
    segments = np.where(mask, segments, 9)  # ids above num_segments do no harm outside the mask
    got = reduce_tokens(values, mask, segment_ids_BL=segments, num_segments=2)
    assert np.isfinite(got).all()


def test_padding_inside_the_mask_is_not_counted():
    _, mask, segments, *_ = packed()
    mask = np.ones_like(mask)
    tokens = count_tokens(mask, segment_ids_BL=segments, num_segments=3)
    np.testing.assert_array_equal(tokens, [[3, 2, 1], [2, 5, 0]])


def test_mistakes_are_refused():
    values, mask, segments, *_ = packed()
    with pytest.raises(ValueError, match="one of mean, sum"):
        reduce_tokens(values, mask, reduction="token_mean")
    with pytest.raises(ValueError, match="example_mean, token_mean, sum"):
        batch_terms(values, mask, reduction="mean")
    with pytest.raises(ValueError, match="example_mean, token_mean, sum"):
        batch_count(mask, reduction="mean")
    with pytest.raises(ValueError, match="example_mean, token_mean, sum"):
        token_reduction("mean")
    with pytest.raises(ValueError, match="both"):
        reduce_tokens(values, mask, segment_ids_BL=segments)
    with pytest.raises(AssertionError):
        reduce_tokens(values[:, :3], mask)
    with pytest.raises(AssertionError):
        example_terms(np.ones(3), mask, reduction="sum")
