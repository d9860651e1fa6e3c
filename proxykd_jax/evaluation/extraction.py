"""The final answer of a model's text: one extractor a benchmark.

An extractor knows the question and what kind of answer it wants, never the gold answer, the model
or the file. A text that gives no answer, or refuses, gives None. ``docs/extraction.md`` compares
what is extracted from public generations with what their authors recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from proxykd_jax.evaluation.choices import choice_in
from proxykd_jax.evaluation.final_answer import cleaned
from proxykd_jax.evaluation.maths import maths_in, same_value
from proxykd_jax.evaluation.numbers import number_in
from proxykd_jax.evaluation.tasks import Item
from proxykd_jax.evaluation.words import PAIRS, brackets_in, listed_words, one_of

# Raised whenever a text may give another answer than before: scores of two versions do not compare.
EXTRACTION_VERSION = 1

Extractor = Callable[[str, Item], str | None]


def extract(item: Item, output: str) -> str | None:
    """The final answer that a model's text gives to an item, canonical; None if it gives none."""
    text = cleaned(output)
    return EXTRACTORS[item.task](text, item) if text else None


def is_right(item: Item, extracted: str | None) -> bool:
    """Whether an extracted answer is the gold one."""
    if not extracted:
        return False
    if item.kind == "number":
        return Fraction(extracted) == Fraction(item.gold)
    if item.kind == "maths":
        return same_value(extracted, item.gold)
    if item.kind == "words":
        return extracted == listed_words(item.gold, item.question)
    return extracted == item.gold


def _choice(text: str, item: Item) -> str | None:
    return choice_in(text, item.choices)


def _number(text: str, item: Item) -> str | None:
    return number_in(text)


def _agieval(text: str, item: Item) -> str | None:
    return _choice(text, item) if item.choices else maths_in(text, item.question)


def _bbh(text: str, item: Item) -> str | None:
    return _BBH[item.kind](text, item)


_BBH: Mapping[str, Extractor] = {
    "choice": _choice,
    "number": _number,
    "true": lambda text, item: one_of(text, PAIRS[0]),
    "yes": lambda text, item: one_of(text, PAIRS[1]),
    "valid": lambda text, item: one_of(text, PAIRS[2]),
    "brackets": lambda text, item: brackets_in(text, item.question),
    "words": lambda text, item: listed_words(text, item.question),
}
EXTRACTORS: Mapping[str, Extractor] = {
    "agieval": _agieval,
    "arc": _choice,
    "bbh": _bbh,
    "csqa": _choice,
    "gsm8k": _number,
    "mmlu": _choice,
}
