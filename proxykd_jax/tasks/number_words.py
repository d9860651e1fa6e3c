"""Numbers in words: "twenty-five", "two and a half million", "a dozen", "three quarters"."""

from __future__ import annotations

import re
from fractions import Fraction

_UP_TO_NINETEEN = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
SMALL = {word: place for place, word in enumerate(_UP_TO_NINETEEN)}
SMALL |= {word: 10 * place for place, word in enumerate(_TENS, 2)}
SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "dozen": 12,
}  # fmt: skip
_PARTS = {
    "half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4, "fourth": 4,
    "fourths": 4, "fifth": 5, "fifths": 5, "sixth": 6, "sixths": 6, "seventh": 7, "sevenths": 7,
    "twelfth": 12, "twelfths": 12, "twentieth": 20, "twentieths": 20, "hundredth": 100,
    "hundredths": 100, "eighth": 8, "eighths": 8, "ninth": 9, "ninths": 9, "tenth": 10,
    "tenths": 10,
}  # fmt: skip
_KNOWN = "|".join(sorted((*SMALL, *SCALES, *_PARTS), key=len, reverse=True))
_PHRASE = re.compile(
    rf"\b(?:(?:minus|negative)\s+)?(?:an?\s+)?(?:{_KNOWN})\b"
    rf"(?:(?:\s+and\s+(?:an?\s+)?|\s*-\s*|\s+(?:an?\s+)?)(?:{_KNOWN})\b)*",
    re.IGNORECASE,
)
# "the one", "one of", "the first half": words that name no amount.
_NO_AMOUNT = re.compile(
    r"\b(?:the|this|that|these|those|which|each|every|no|any|some|other|another|first|second|last|only|"
    r"correct|right)\s+$",
    re.IGNORECASE,
)


def in_words(text: str) -> list[tuple[int, int, Fraction]]:
    """(start, end, value) of each number in words."""
    found = []
    for match in _PHRASE.finditer(text):
        amount = _value(re.findall(r"[a-z]+", match[0].lower()))
        single = match[0].lower() in ("one", *_PARTS)
        vague = _NO_AMOUNT.search(text[: match.start()]) or (
            single and re.match(r"\s+of\b", text[match.end() :])
        )
        if amount is not None and not vague:
            found.append((match.start(), match.end(), amount))
    return found


def part_after(words: str) -> Fraction | None:
    """The value of "a half" or "three quarters", as in "2 and a half"; None for other words."""
    return _value(re.findall(r"[a-z]+", words.lower()))


def _value(words: list[str]) -> Fraction | None:
    """The value of the longest beginning that is one number; None if there is none."""
    sign = 1
    if words and words[0] in ("minus", "negative"):
        sign, words = -1, words[1:]
    total, current, known = Fraction(0), Fraction(0), False
    pending = False  # an article or "and" stands before the next word
    for place, word in enumerate(words):
        if word in ("a", "an", "and"):
            pending = True
            continue
        after = words[place + 1 : place + 2]
        if word in SMALL and known and pending and after and after[0] in _PARTS:
            # "two and three quarters"
            return sign * (total + current + Fraction(SMALL[word], _PARTS[after[0]]))
        if word in SMALL:
            value = SMALL[word]
            fits = (
                current == 0
                or (current % 100 == 0 and value < 100)
                or (current % 10 == 0 and current % 100 >= 20 and 0 < value < 10)
            )
            if known and not fits:
                break
            current += value
        elif word in SCALES:
            factor = SCALES[word]
            if known and not current and not total:
                return Fraction(0)
            if factor <= 100:
                current = (current or Fraction(1)) * factor
            else:
                total, current = total + (current or Fraction(1)) * factor, Fraction(0)
        else:
            rest = words[place + 1 :]
            if rest[:1] == ["a"] and rest[1:2] and rest[1] in SCALES and not known:
                current = Fraction(1, _PARTS[word]) * SCALES[rest[1]]
                return sign * current
            if not known:
                return sign * Fraction(1, _PARTS[word]) if pending or word == "half" else None
            if pending:  # "two and a half", and "two and a half million"
                current += Fraction(1, _PARTS[word])
            elif word.endswith("s") or current == 1:
                current = current / _PARTS[word]
            else:
                break
        known, pending = True, False
    return sign * (total + current) if known else None
