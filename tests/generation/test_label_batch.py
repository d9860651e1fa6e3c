"""Soft labels of a batch against float64 NumPy over the full vocabulary."""

import functools
import hashlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.data.collate import TokenRow, collate_rows
from proxykd_jax.data.soft_labels import SoftLabelStore, SoftLabelWriter
from proxykd_jax.generation import label_batch, label_rows
from proxykd_jax.generation.label_batch import soft_labels_of_logits, topk_soft_labels
from proxykd_jax.generation.label_rows import RowScorer, score_split, top_k_labels
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
    # A tail of 1e-20 has six correct digits; 1 - sum would have none.
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


@pytest.mark.parametrize("vocab_size", [None, 1999, 1500])
def test_blocks_of_a_large_vocabulary(vocab_size):
    """Logits are whole numbers, so equal entries lie in chosen blocks and in others.

    The last block is not full.
    """
    logits = np.random.default_rng(3).integers(-9, 9, (40, 2001)).astype(np.float32)
    logits[:8, 37:90] = 9  # more equal entries than top_k
    logits[8:12] = -1
    logits[12:16, 3:] = -np.inf
    logits[16, -3:] = 12
    labels = np.arange(40) * 50
    found = soft_labels_of_logits(
        jnp.asarray(logits), jnp.asarray(labels), top_k=5, vocab_size=vocab_size
    )
    with np.errstate(divide="ignore"):
        ids, logps, gold, tail = exact(logits, labels, 5, vocab_size=vocab_size)
    some = [row for row in range(40) if row not in range(12, 16)]
    np.testing.assert_array_equal(np.asarray(found.ids_K)[some], ids[some])
    np.testing.assert_allclose(found.logps_K, logps, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.gold_logps, gold, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.tail_logps, tail, rtol=1e-5, atol=1e-5)


def test_at_the_whole_vocabulary_nothing_lies_outside():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 12)).astype(np.float32)
    logits[0] = 2.0
    logits[1, 3:] = -np.inf
    found = soft_labels_of_logits(jnp.asarray(logits), jnp.zeros(50, jnp.int32), top_k=12)
    assert np.isneginf(found.tail_logps).all()
    np.testing.assert_allclose(np.exp(found.logps_K).sum(-1), 1, atol=1e-6)
    assert not np.isnan(found.logps_K).any()


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"vocab_size": 90}])
def test_the_vocabulary_is_not_sorted(options):
    """Without XLA's rewrite, top_k on a CPU is a full sort, which is 100 times slower."""

    def labels_of(logits, labels):
        return soft_labels_of_logits(logits, labels, top_k=10, **options)

    arguments = jnp.zeros((8, 100)), jnp.zeros(8, jnp.int32)
    program = jax.jit(labels_of).lower(*arguments).compile().as_text()
    assert all(int(n) <= 10 for n in re.findall(r"(\d+)\]\S* sort\(", program))
    if jax.default_backend() == "cpu":
        assert "TopK" in program


def token_batch(rows, length, segments=1):
    token_rows = [[TokenRow(np.asarray(t, np.int32), p, "")] for t, p in rows]
    return collate_rows(token_rows, length, segments, len(rows) + 1)


def some_batch() -> tuple[list, TokenBatch]:
    rng = np.random.default_rng(2)
    rows = [(rng.integers(1, 24, size), prompt) for size, prompt in ((9, 3), (14, 13), (5, 1))]
    return rows, token_batch(rows, 16)


@pytest.mark.parametrize("chunked", [False, True])
def test_soft_labels_of_a_batch(monkeypatch, chunked):
    if chunked:
        # This top_k differs from the one below, so that the program is traced again.
        monkeypatch.setattr(label_batch, "_LOGITS_ALIVE", 24 * 4 * 3)
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


class Rows:
    """A split that is kept in memory."""

    def __init__(self, count=23, seed=0):
        rng = np.random.default_rng(seed)
        self.rows = []
        for i in range(count):
            size = int(rng.integers(2, 40))
            tokens = rng.integers(1, 24, size).astype(np.int32)
            row_id = hashlib.sha256(bytes([i])).hexdigest()
            self.rows.append(TokenRow(tokens, int(rng.integers(1, size)), row_id))

    def __len__(self):
        return len(self.rows)

    def read(self, indices):
        return [self.rows[i] for i in indices]


def score(folder, rows, *, fail_at=None, **changes):
    config, params, adapter = tiny_model()
    done = []

    def report(index, total, tokens):
        done.append(index)
        if len(done) == fail_at:
            raise KeyboardInterrupt

    writer = SoftLabelWriter(folder, "distill", vocab_size=24, top_k=5, store_dtype="float32")
    options = {"rows_per_part": 6, "report": report, "end_token_ids": [3, 7], **changes}
    batch_size = options.pop("batch_size", 4)
    label = functools.partial(top_k_labels, params, config=config, top_k=5, vocab_size=24)
    scorer = RowScorer(params, adapter, config, label, batch_size, max_length=40)
    score_split(rows, writer, scorer, **options)
    settings = {"top_k": 5, "temperature": 1.0, "store_dtype": "float32", "vocab_size": 24}
    return SoftLabelStore(folder, {"settings": settings, "inputs": {}})


def test_a_split_is_scored_at_its_answers(tmp_path, monkeypatch):
    # A batch has several pieces, and the last one is not full.
    monkeypatch.setattr(label_rows, "_FEWEST_POSITIONS", 16)
    monkeypatch.setattr(label_rows, "_LOGITS_ALIVE", 24 * 16)
    rows = Rows()
    store = score(tmp_path / "s", rows)
    assert store.num_rows("distill") == 23 and store.num_parts("distill") == 4
    read = store.read("distill", range(23), [row.row_id for row in rows.rows])
    for row, labels in zip(rows.rows, read, strict=True):
        logps = full_logps(tiny_model(), row.tokens[:-1])[row.prompt_length - 1 :]
        ids, expected, gold, tail = exact(logps, row.answer, 5)
        np.testing.assert_array_equal(labels.ids, ids)
        np.testing.assert_allclose(labels.logps, expected, atol=3e-5)
        np.testing.assert_allclose(labels.gold_logps, gold, atol=3e-5)
        np.testing.assert_allclose(labels.tail_logps, tail, atol=3e-5)
        assert labels.finished == (row.tokens[-1] in (3, 7))
    np.testing.assert_allclose(
        store.seq_logliks("distill"), [r.gold_logps.sum(dtype=np.float64) for r in read], rtol=1e-12
    )


def test_scoring_that_was_cut_off_goes_on_to_the_same_bytes(tmp_path):
    rows = Rows()
    score(tmp_path / "whole", rows)
    with pytest.raises(KeyboardInterrupt):
        score(tmp_path / "cut", rows, fail_at=2)
    assert len(list((tmp_path / "cut" / "distill").iterdir())) == 2
    score(tmp_path / "cut", rows)
    for path in (tmp_path / "whole" / "distill").iterdir():
        assert (tmp_path / "cut" / "distill" / path.name).read_bytes() == path.read_bytes()


def test_batch_mates_do_not_matter(tmp_path):
    rows = Rows()
    one = score(tmp_path / "one", rows)
    other = score(tmp_path / "other", rows, batch_size=8, rows_per_part=23)
    for a, b in zip(one.read("distill", range(23)), other.read("distill", range(23)), strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-5)
