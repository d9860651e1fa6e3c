"""The split is a pure function of the first user message."""

import hashlib
import math
import random
import unicodedata
from collections import Counter

import pytest

from proxykd_jax.config.schema import SharesConfig
from proxykd_jax.texts.normalise import normalise_text
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.split import (
    effective_validation_fraction,
    selection_hash,
    split_name,
)

SHARES = SharesConfig()


def row(prompt, answer="yes"):
    return TextRow((Message("user", prompt), Message("assistant", answer)), None, "f:1")


def split(key, fraction=0.02, shares=SHARES):
    return split_name(key, shares=shares, validation_fraction=fraction)


def test_shares_hold_within_binomial_error():
    rows = 40_000
    counts = Counter(split(f"question {n}") for n in range(rows))
    expected = {"validation": 0.02, "warmup": 0.098, "align": 0.441, "distill": 0.441}
    assert sum(counts.values()) == rows
    for name, share in expected.items():
        assert abs(counts[name] - rows * share) < 4.5 * math.sqrt(rows * share * (1 - share))


def test_the_hash_is_the_documented_one():
    """Another implementation, from the documentation alone, agrees on every prompt."""
    for n in range(500):
        digest = hashlib.sha256(f"question {n}".encode()).digest()
        held, place = (int.from_bytes(digest[i : i + 8], "big") / 2**64 for i in (0, 8))
        name = "warmup" if place < 0.1 else "align" if place < 0.55 else "distill"
        assert split(f"question {n}") == ("validation" if held < 0.02 else name)


@pytest.mark.parametrize(
    "variant", ["WHAT is\tthe\n capital of Ｆrance? ", " what is the capital of france?"]
)
def test_variants_of_a_prompt_share_a_split(variant):
    for n in range(50):
        plain = f"What is the capital of France? {n}"
        assert split(f"{variant} {n}") == split(plain)
        assert row(f"{variant} {n}").first_user_message == row(plain).first_user_message


def test_only_the_first_user_message_counts():
    first = row("hello", "a")
    longer = TextRow(
        (Message("system", "Be brief."), *first.messages, Message("user", "and?")), None, "g:2"
    )
    assert first.first_user_message == longer.first_user_message == "hello"
    assert TextRow((), "A  Story", "h:3").first_user_message == "a story"


def test_validation_grows_with_its_fraction_and_the_cut_stays():
    keys = [f"question {n}" for n in range(2000)]
    small, large = ([split(key, f) for key in keys] for f in (0.02, 0.2))
    for before, after in zip(small, large, strict=True):
        assert after in ("validation", before)
    assert small.count("validation") < large.count("validation")
    assert "validation" not in {split(key, 0.0) for key in keys}


def test_a_share_of_zero_is_empty():
    keys = [f"question {n}" for n in range(2000)]
    for shares in ((0, 0.5, 0.5), (0.5, 0.5, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        names = dict(zip(("warmup", "align", "distill"), shares, strict=True))
        used = {split(key, 0.0, SharesConfig(**names)) for key in keys}
        assert used == {name for name, share in names.items() if share}


@pytest.mark.parametrize(
    ("rows", "fraction", "least", "expected"),
    [
        (100_000, 0.02, 64, 0.02),
        (3200, 0.02, 64, 0.02),
        (1000, 0.02, 64, 0.064),
        (640, 0.02, 64, 0.1),
        (488, 0.02, 64, 0.1),
        (1, 0.02, 64, 0.1),
        (488, 0.3, 64, 0.3),
        (488, 0.0, 0, 0.0),
        (0, 0.02, 64, 0.02),
    ],
)
def test_effective_validation_fraction(rows, fraction, least, expected):
    found = effective_validation_fraction(rows, validation_fraction=fraction, validation_rows=least)
    assert found == pytest.approx(expected)


def test_answers_to_one_prompt_are_selected_apart():
    assert selection_hash(row("a", "b")) != selection_hash(row("a", "c"))
    assert selection_hash(row("A ", "b")) == selection_hash(row("a", "b"))


def test_normalising_twice_changes_nothing():
    for code in range(0x110000):
        if not 0xD800 <= code < 0xE000:
            once = normalise_text(f"x{chr(code)} y")
            assert normalise_text(once) == once
    marks = [chr(c) for c in range(0x3000) if unicodedata.combining(chr(c))]
    draw = random.Random(0)
    for _ in range(2000):
        once = normalise_text("".join(draw.choices(marks + list("aİſßΣϊ\u1fb3"), k=6)))
        assert normalise_text(once) == once
