r"""Numbers in a model's text: ``$1,234.50``, ``-3``, ``\frac{1}{2}``, ``2 + 3 = 5``, ``50%``."""

from __future__ import annotations

import re
from fractions import Fraction

from proxykd_jax.tasks.final_answer import (
    bold_spans,
    closing_sentences,
    marked_spans,
    sentences,
    without_emphasis,
)

_NUMBER = re.compile(
    r"""
    (?<![\w.])
    (?P<sign>-\s?(?=[$€£¥]?\s?[\d.])|)
    (?:[$€£¥]\s?)?
    (?P<minus>-|)
    (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))
    (?P<part>\.\d+|)
    (?:\s*/\s*(?P<below>\d+)(?![\d/]))?
    (?P<ordinal>(?:st|nd|rd|th)\b|)(?!\d)
    (?:\s*(?P<scale>thousand|million|billion)\b)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SCALES = {"thousand": 1000, "million": 10**6, "billion": 10**9}
# Calculator annotations: keep the result after them, or the one inside if none follows.
_CALCULATION = re.compile(r"<<([^<>]*)>>(\s*[$€£]?[\d,.]*\d)?")
_FRACTION = re.compile(r"\\[dtc]?frac\s*\{?\s*(-?[\d.,]+)\s*\}?\s*\{?\s*([\d.,]+)\s*\}?")
# "in 5 days", "for the 3 of them": a number that says when, for whom or out of how many.
_ADJUNCT = re.compile(
    r"\b(?:in|after|for|within|over|at|every|per|during|from|out\s+of|of\s+the|of\s+(?:his|her|"
    r"their|its|these|those)|each)\s+(?:(?:the|his|her|their|its|these|those|only|just|about|"
    r"approximately|next|first|last|other|all|another|a\s+total\s+of)\s+)*[$€£]?$",
    re.IGNORECASE,
)
_STANDS_ALONE = re.compile(r"[^\w(]*")
_OPERATOR = re.compile(r"\s*(?:[-+*/×÷^=]|x\s*\d|times\b|plus\b|minus\b|divided\b)")
# Longer ones are not answers, and Python refuses to parse much longer ones.
_ENDLESS = re.compile(r"\d{200,}")
# The part after such a word concludes from the part before.
_CLAUSE = re.compile(
    r"[,;]\s+(?:and\s+)?(?:so|thus|therefore|hence|which\s+means|meaning)\b", re.IGNORECASE
)
_UP_TO_TWENTY = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty"
)
_WORDS = {word: value for value, word in enumerate(_UP_TO_TWENTY.split("|"))}
_WORD = re.compile(rf"\b({_UP_TO_TWENTY})\b", re.IGNORECASE)


def number_in(output: str) -> str | None:
    """The number that a text gives as its final answer, in canonical form; None if it gives none.

    The number after the last mark. Without marks, the bold number in the last paragraph. Otherwise
    that of the last sentence with a number: what follows its "=", or its last number, except those
    that say when or for how many ("in 1 week").
    """
    text = _readable(output)
    for span in marked_spans(without_emphasis(text)):
        found = _of_span(span.text, boxed=span.boxed)
        if found is not None:
            return found
    for part in bold_spans(text):
        found = _of_span(part, boxed=True)
        if found is not None:
            return found
    text = without_emphasis(text)
    closing = closing_sentences(text)
    if not closing:
        return None
    for sentence in closing + sentences(text)[::-1]:
        found = _concluded(sentence)
        if found is not None:
            return found
    return None


def canonical(text: str) -> str | None:
    """The canonical form of a text that is one number: "$1,050.00" is "1050"; otherwise None.

    Integers and finite decimals are written out; other fractions look like "1/3".
    """
    found = list(_NUMBER.finditer(_readable(text)))
    return _written(found[0]) if len(found) == 1 else None


def _readable(text: str) -> str:
    text = _ENDLESS.sub(" ", text)
    text = _CALCULATION.sub(lambda m: m[2] or m[1].rpartition("=")[2], text)
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", "").replace(",\\", ",")
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = _FRACTION.sub(r"\1/\2", text)
    # Other LaTeX becomes a separator, so that "\text{ab}5" and "$-3$" can be read.
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{", " {", text)
    return re.sub(r"\$(?=\D)(?![-.]\d|\s?\d)", " ", text)


def _of_span(text: str, *, boxed: bool) -> str | None:
    """The number of a marked span: at its start, or otherwise the first one after its last "="."""
    if not boxed:
        text = sentences(text)[0] if sentences(text) else ""
        leading = _NUMBER.search(text)
        alone = leading and _STANDS_ALONE.fullmatch(text[: leading.start()])
        if leading and alone and not _OPERATOR.match(text, leading.end()):
            return _written(leading)
    _, equals, after = text.rpartition("=")
    for part in (after, text) if equals else (text,):
        found = _NUMBER.search(part)
        if found is not None:
            return _written(found)
    word = _WORD.search(text)
    return None if word is None else str(_WORDS[word[1].lower()])


def _concluded(sentence: str) -> str | None:
    for clause in _CLAUSE.split(sentence)[::-1]:
        _, equals, after = clause.rpartition("=")
        if equals and (found := _NUMBER.search(after)) is not None:
            return _written(found)
        # "the 3rd day" says which one; "18th" can be an answer only after a mark.
        numbers = [each for each in _NUMBER.finditer(clause) if not each["ordinal"]]
        main = [each for each in numbers if not _ADJUNCT.search(clause[: each.start()])]
        chosen = main or numbers
        if chosen:
            return _written(chosen[-1])
    return None


def _written(match: re.Match[str]) -> str:
    value = Fraction((match["whole"].replace(",", "") or "0") + match["part"])
    below = match["below"]
    if below and int(below):
        value /= int(below)
    value *= _SCALES.get((match["scale"] or "").lower(), 1)
    before = match.string[: match.start()].rstrip()
    binary = bool(before) and (before[-1].isdigit() or before[-1] in ")}%")
    if match["minus"] or (match["sign"] and not binary):
        value = -value
    return _text(value)


def _text(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    below = value.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    if below != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    sign = "-" if value < 0 else ""
    whole, part = divmod(abs(int(value * 10**digits)), 10**digits)
    return f"{sign}{whole}.{part:0{digits}d}"
