"""max_rows keeps the rows with the smallest hashes that fit, whatever the order of the files."""

import math
import random
from collections import Counter

import numpy as np
import pytest

from proxykd_jax.config.schema import SharesConfig, SourceConfig
from proxykd_jax.texts import row_limit
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.row_limit import RowLimit
from proxykd_jax.texts.split import selection_hash, split_name

SOURCES = [SourceConfig(path="a.jsonl"), SourceConfig(path="b.jsonl")]


class WordRenderer:
    """A renderer with one token per word, which counts its calls."""

    def __init__(self):
        self.rows = 0

    def encode_batch(self, rows, source):
        assert rows and source in SOURCES
        self.rows += len(rows)
        words = [(len(m.content.split()) for m in row.messages) for row in rows]
        return [(np.zeros(prompt + answer), prompt, None) for prompt, answer in words]


def row(number, words=1):
    answer = Message("assistant", " ".join(["yes"] * words))
    return TextRow((Message("user", f"question {number}"), answer), None, "f:1")


def chosen(rows, max_rows, max_length=5):
    renderer = WordRenderer()
    limit = RowLimit(max_rows, max_length, renderer)
    for number, item in enumerate(rows):
        limit.add(item, SOURCES[number * 2 // len(rows)])
    return {r.messages for r, kept in zip(rows, limit.chosen(), strict=True) if kept}, renderer.rows


def fits(messages):
    return sum(len(m.content.split()) for m in messages) <= 5


@pytest.mark.parametrize("max_rows", [1, 10, 100])
def test_the_smallest_hashes_among_the_rows_that_fit(max_rows, monkeypatch):
    monkeypatch.setattr(row_limit, "_BATCH_ROWS", 16)
    rows = [row(n, words=3 if n % 3 else 4) for n in range(1000)]
    kept, looked_at = chosen(rows, max_rows)
    fitting = sorted((r for r in rows if fits(r.messages)), key=selection_hash)
    assert {m for m in kept if fits(m)} == {r.messages for r in fitting[:max_rows]}
    # Rows that do not fit are in `kept` too if their hash is below the same threshold.
    limit = selection_hash(fitting[max_rows])
    assert kept == {r.messages for r in rows if selection_hash(r) < limit}
    # The other rows were never tokenised.
    assert looked_at < 1.5 * (max_rows + 1) * (1 + math.log(1000 / max_rows)) * 1.5 + 40
    random.Random(0).shuffle(rows)
    assert chosen(rows, max_rows)[0] == kept


def test_fewer_rows_than_wanted_all_stay():
    rows = [row(n, words=1 + n % 5) for n in range(50)]
    assert len(chosen(rows, 50)[0]) == len(chosen(rows, 10**9)[0]) == 50
    assert chosen([], 5) == (set(), 0)


def test_equal_rows_stay_or_go_together():
    copies = [row(n) for n in range(4) for _ in range(50)]
    for most, kept in ((10, 0), (50, 1), (60, 1), (149, 2), (200, 4)):
        assert len(chosen(copies, most)[0]) == kept


def test_the_choice_is_independent_of_the_split():
    rows = [row(n) for n in range(20_000)]
    kept, _ = chosen(rows, 5000)
    counts = Counter(
        split_name(messages[0].content, shares=SharesConfig(), validation_fraction=0.02)
        for messages in kept
    )
    assert abs(counts["align"] - 0.441 * 5000) < 4.5 * math.sqrt(5000 * 0.441 * 0.559)
