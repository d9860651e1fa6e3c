"""Sets of digests of (prompt, answer): exact and small."""

import random

import pytest

from proxykd_jax.texts.dedup import Deduplicator, DigestSet, PromptSet, row_digest
from proxykd_jax.texts.records import Message, TextRow


def row(prompt, answer="yes", system=None):
    head = (Message("system", system),) if system else ()
    return TextRow((*head, Message("user", prompt), Message("assistant", answer)), None, "f:1")


def test_behaves_like_a_set():
    draw = random.Random(0)
    # Only few bits at both ends differ, so that probes collide and wrap around the table's end.
    values = [draw.choice([0, 1, 2**64 - 1, draw.getrandbits(64)]) for _ in range(300)]
    values += [(draw.getrandbits(4) << 60) | 1023 for _ in range(300)]
    values += [draw.getrandbits(64) for _ in range(5000)]
    table, reference = DigestSet(), set()
    for value in values:
        assert (value in table) == (value in reference)
        assert table.add(value) == (value not in reference)
        reference.add(value)
        assert len(table) == len(reference)
    assert all(value in table for value in reference)
    assert draw.getrandbits(64) not in table


@pytest.mark.parametrize("rows", [5_000, 30_000, 200_000])
def test_at_most_24_bytes_a_row(rows):
    draw = random.Random(rows)
    table = DigestSet()
    for _ in range(rows):
        table.add(draw.getrandbits(64))
    assert table.nbytes <= 24 * rows


def test_answers_to_one_prompt_are_all_kept():
    seen = Deduplicator()
    rows = [row("a", "b"), row("a", "c"), row("b", "a"), row("a", "b", system="s")]
    assert [seen.is_new(r) for r in rows] == [True] * 4
    assert [seen.is_new(r) for r in (row("A ", "b"), row("a", " B\n"))] == [False, False]
    assert len(seen) == 4


def test_border_between_turns_matters():
    assert row_digest(row("ab", "c")) != row_digest(row("a", "bc"))
    text = TextRow((), "a", "f:1")
    assert row_digest(text) != row_digest(row("a"))


def test_prompt_set_compares_as_the_split_does():
    prompts = PromptSet([row("What is it?", "one"), row("Other", "two")])
    assert row("what  IS it?", "three") in prompts and "OTHER" in prompts
    assert "What is it" not in prompts and len(prompts) == 2
    assert not prompts.add(row("other")) and prompts.add("new") and "New" in prompts
