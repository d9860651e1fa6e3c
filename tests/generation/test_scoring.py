"""Soft labels of a batch against float64 NumPy over the full vocabulary."""

import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.generation import scoring
from proxykd_jax.generation.scoring import (
    soft_labels_of_logits,
    topk_soft_labels,
    topk_soft_labels_at,
)
from proxykd_jax.types import TokenBatch
from tests.generation.tiny import full_logps, tiny_model


def exact(logits, labels, top_k, temperature=1.0, vocab_size=None):
    """(ids, logps, gold_logps, tail_logps) in float64, ties to the lower id."""
    logits = np.asarray(logits, np.float64)

    def log_softmax(x):
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    logps = log_softmax(logits / temperature)
    ids = np.argsort(-logps[..., :vocab_size], axis=-1, kind="stable")[..., :top_k]
    outside = np.ones(logits.shape, bool)
    np.put_along_axis(outside, ids, False, axis=-1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(outside, np.exp(logps), 0).sum(-1))
    gold = np.take_along_axis(log_softmax(logits), labels[..., None], -1)[..., 0]
    return ids, np.take_along_axis(logps, ids, -1), gold, tail


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab_size", [None, 31])
def test_against_float64(scale, temperature, vocab_size):
    rng = np.random.default_rng(0)
    logits = (scale * rng.normal(size=(4, 6, 37))).astype(np.float32)
    labels = rng.integers(0, 37, (4, 6))
    found = soft_labels_of_logits(
        jnp.asarray(logits), jnp.asarray(labels), top_k=5, temperature=temperature,
        vocab_size=vocab_size,
    )  # fmt: skip
    ids, logps, gold, tail = exact(logits, labels, 5, temperature, vocab_size)
    np.testing.assert_array_equal(found.ids_K, ids)
    np.testing.assert_allclose(found.logps_K, logps, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.gold_logps, gold, rtol=1e-5, atol=1e-5)
    # A tail of 1e-20 is known to six digits, which 1 - sum could not give.
    np.testing.assert_allclose(found.tail_logps, tail, rtol=1e-5, atol=1e-5)
    assert tail.min() < -8 or scale < 20


def test_ties_at_the_edge_of_the_top_k_count_once():
    logits = np.zeros((2, 9), np.float32)
    logits[1, [2, 5, 7]] = 3.0
    labels = np.array([8, 7])
    for top_k in (1, 2, 4, 8):
        found = soft_labels_of_logits(jnp.asarray(logits), jnp.asarray(labels), top_k=top_k)
        ids, logps, gold, tail = exact(logits, labels, top_k)
        np.testing.assert_array_equal(found.ids_K, ids)
        np.testing.assert_allclose(found.logps_K, logps, atol=1e-6)
        np.testing.assert_allclose(found.gold_logps, gold, atol=1e-6)
        np.testing.assert_allclose(found.tail_logps, tail, atol=1e-6)


def test_at_the_whole_vocabulary_nothing_lies_outside():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    logits[0] = 2.0
    logits[1, 3:] = -np.inf
    found = soft_labels_of_logits(jnp.asarray(logits), jnp.zeros(50, jnp.int32), top_k=12)
    assert np.isneginf(found.tail_logps).all()
    np.testing.assert_allclose(np.exp(found.logps_K).sum(-1), 1, atol=1e-6)
    assert not np.isnan(found.logps_K).any()


def token_batch(rows, length, segments=1):
    from proxykd_jax.data.collate import TokenRow, collate_rows

    token_rows = [[TokenRow(np.asarray(t, np.int32), p, "")] for t, p in rows]
    return collate_rows(token_rows, length, segments, len(rows) + 1)


def some_batch() -> tuple[list, TokenBatch]:
    rng = np.random.default_rng(2)
    rows = [(rng.integers(1, 24, size), prompt) for size, prompt in ((9, 3), (14, 13), (5, 1))]
    return rows, token_batch(rows, 16)


@pytest.mark.parametrize("chunked", [False, True])
def test_soft_labels_of_a_batch(monkeypatch, chunked):
    if chunked:
        # Another top_k than below, so that the program is traced again.
        monkeypatch.setattr(scoring, "_LOGITS_ALIVE", 24 * 4 * 3)
    config, params, adapter = tiny_model()
    top_k = 7 if chunked else 6
    rows, batch = some_batch()
    ids_BLK, logps_BLK, gold_BL, tail_BL = topk_soft_labels(
        params, adapter, batch, config=config, top_k=top_k
    )
    assert ids_BLK.shape == logps_BLK.shape == (4, 16, top_k)
    for b, (tokens, _) in enumerate(rows):
        logps = full_logps(tiny_model(), tokens[:-1])
        ids, expected, gold, tail = exact(logps, tokens[1:], top_k)
        size = len(tokens) - 1
        np.testing.assert_array_equal(ids_BLK[b, :size], ids)
        np.testing.assert_allclose(logps_BLK[b, :size], expected, atol=3e-5)
        np.testing.assert_allclose(gold_BL[b, :size], gold, atol=3e-5)
        np.testing.assert_allclose(tail_BL[b, :size], tail, atol=3e-5)


def test_chosen_positions_equal_all_of_them():
    config, params, adapter = tiny_model()
    _, batch = some_batch()
    everything = topk_soft_labels(params, adapter, batch, config=config, top_k=6)
    places = np.flatnonzero(batch.mask_BL).astype(np.int32)
    assert len(places) == 6 + 1 + 4
    padded = np.pad(places, (0, 5))
    found = topk_soft_labels_at(params, adapter, batch, padded, config=config, top_k=6)
    ids_MK, logps_MK, gold_M, tail_M = (
        np.asarray(array).reshape(-1, *array.shape[2:])[padded] for array in everything
    )
    np.testing.assert_array_equal(found.ids_K, ids_MK)
    np.testing.assert_allclose(found.logps_K, logps_MK, atol=1e-5)
    np.testing.assert_allclose(found.gold_logps, gold_M, atol=1e-5)
    np.testing.assert_allclose(found.tail_logps, tail_M, atol=1e-5)
