"""Extracts the final answer from a model's text, with one extractor per benchmark.

An extractor knows the question and the kind of answer, but never the gold answer, the model or the
file. It returns None for a text that gives no answer or refuses. ``docs/extraction.md`` compares
its results on public generations with those that their authors recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction

from proxykd_jax.tasks.choices import choice_in
from proxykd_jax.tasks.final_answer import cleaned, corrected, without_check
from proxykd_jax.tasks.items import Item
from proxykd_jax.tasks.maths import maths_in, same_value
from proxykd_jax.tasks.numbers import number_in
from proxykd_jax.tasks.words import PAIRS, brackets_in, listed_words, one_of

# Increase it when a text may give another answer: scores of two versions are not comparable.
EXTRACTION_VERSION = 3

Extractor = Callable[[str, Item], str | None]


def extract(item: Item, output: str) -> str | None:
    """The final answer that a text gives to an item, in canonical form; None if it gives none."""
    text = cleaned(output)
    if not text:
        return None
    read = EXTRACTORS[item.task]
    correction = corrected(text)
    found = read(correction, item) if correction else None
    return found or read(without_check(text), item)


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


def can_be_right(item: Item) -> bool:
    """Whether some answer to an item is right: whether its gold is, in a form that is asked for."""
    gold = item.gold
    if item.kind == "choice":
        return bool(gold) and set(gold) <= {label for label, _ in item.choices}
    texts = (f"The answer is {gold}.", f"\\boxed{{{gold}}}", f"#### {gold}", gold)
    return any(is_right(item, extract(item, text)) for text in texts)


def _choice(text: str, item: Item) -> str | None:
    return choice_in(text, item.choices, several=item.several)


def _number(text: str, item: Item) -> str | None:
    return number_in(text, item.question)


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
