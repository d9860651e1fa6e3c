r"""Mathematical answers: the result that a text gives, and whether two results are equal."""

from __future__ import annotations

import cmath
import re
from collections.abc import Sequence

from proxykd_jax.tasks.expression import letters_in, value
from proxykd_jax.tasks.final_answer import (
    Statement,
    bold_spans,
    boxed_contents,
    closing_sentences,
    decide,
    last_paragraph,
    refuses,
    sentences,
    unwrapped,
    without_emphasis,
)
from proxykd_jax.tasks.number_words import in_words
from proxykd_jax.tasks.numbers import with_fractions
from proxykd_jax.texts.normalise import normalised_words

# Two values for each letter, far from singular points of answers' formulas.
_POINTS = (0.8371, 1.4143 + 0.17j), (0.6113, 2.2171 - 0.29j)
_TOLERANCE = 1e-9
# A bold span with more words is an explanation.
_FEW_WORDS = 3
_MATHS = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_BLANK = re.compile(r"\(\s*(?:\$)?\s*\\(?:quad|qquad)\s*(?:\$)?\s*\)|_{3,}|\\underline\{")
_UNIT = (
    r"(?:(?:square|cubic|sq\.?|cu\.?)\s+)?(?:cm|mm|km|kg|mg|ml|mL|ft|yd|lbs?|oz|mph|kph|hours?|hrs?|"
    r"minutes?|mins?|seconds?|secs?|days?|weeks?|months?|years?|dollars?|cents?|degrees?|radians?|"
    r"units?|met(?:er|re)s?|(?:centi|kilo|milli)met(?:er|re)s?|(?:kilo|milli)?grams?|feet|foot|"
    r"inch(?:es)?|yards?|miles?|pounds?|ounces?|gallons?|lit(?:er|re)s?|percent|points?|ways?|people|"
    r"students?|(?<=\s)[msghLNJWV]|(?<=/)[smhL])"
)
_POWER = r"(?:\s*\^\s*\{?\s*-?\d\s*\}?|[²³])?"
_UNITS = re.compile(rf"(?<=[\d}})\s])(?:{_UNIT}{_POWER})(?:\s*(?:/|per\s)\s*{_UNIT}{_POWER})?\s*$")
# "x = 4 or x = -1"
_SEVERAL = re.compile(r"([A-Za-z])\s*=[^=]*(?:,|\bor\b|\band\b)[^=]*(?<![A-Za-z])\1\s*=")
_SPACED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,;: ]|~|[ '])\d{3})+(?![\d/])")
_MIXED = re.compile(r"(?<![\d.^/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])")
_SCALED = re.compile(r"(?<=\d)\s*(?:\\text\s*\{)?\s*(thousand|million|billion|trillion)\b\s*\}?")
_SCALES = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_APPROXIMATE = re.compile(r"^\s*(?:\\approx|≈|~|about\s|approximately\s)\s*")
# Words that are results, although they would refuse an answer to another question.
_RESULT = re.compile(
    r"\W*(?:\\text\s*\{)?\s*(?:none|neither|nothing|no\s+(?:real\s+)?solutions?)\b", re.IGNORECASE
)
_SPACING = re.compile(
    r"\\(?:[,;:! ]|quad|qquad|displaystyle|left|right|big[lr]?|Big[lr]?)(?![a-z])"
)
_FONT = re.compile(
    r"\\(?:mathrm|mathbf|mathit|mathsf|rm|bf|operatorname|boldsymbol)\s*\{([^{}]*)\}"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm)?|mbox)\s*\{([^{}]*)\}(?:\s*\^\s*\{?\d\}?)?")
_ASSIGNED = re.compile(
    r"^\s*(?:[A-Za-z](?:_\{?\w+\}?)?(?:\(-?\w+\))?|\\[a-z]+)\s*(?:=|\\in(?![a-z]))\s*"
)


def maths_in(output: str, question: str) -> str | None:
    r"""The result that a text gives; None if it gives none.

    The last final statement, or the last formula of the last sentences. A question with several
    blanks asks for as many results, which are joined with ";".

    Args:
      output: a text from ``cleaned``.
      question: its blanks are "(\quad)" or underscores.
    """
    blanks = len(_BLANK.findall(question))
    if blanks > 1:
        boxes = [content for _, content in boxed_contents(last_paragraph(output))]
        if len(boxes) == blanks:
            return ";".join(box.strip() for box in boxes)
    text = without_emphasis(output)
    decided, found = decide(text, lambda statement: _of_statement(statement, blanks))
    if decided:
        return found
    for part in bold_spans(output):
        if is_mathematical(part) or len(part.split()) <= _FEW_WORDS:
            return _of_line(part, blanks) or part
    for sentence in closing_sentences(text):
        if refuses(sentence):
            return None
        if found := concluded_value(sentence, blanks):
            return found
    return None


def _of_statement(statement: Statement, blanks: int) -> str | None:
    text = unwrapped(statement.first)
    if statement.denied or (refuses(text) and not _RESULT.match(text)):
        return None
    found = statement.text if statement.whole else _of_line(statement.text, blanks)
    return found.strip() or None if found else None


def same_value(one: str, other: str) -> bool:
    """Whether two results are equal: as text without typography, as values, or part by part.

    A percentage equals its number and its hundredth: 25% is 25 and 0.25.
    """
    if ("%" in one) != ("%" in other) and _equal_formulas(
        *(f"({plain(part)}){'/100' if '%' in part else ''}" for part in (one, other))
    ):
        return True
    first, second = plain(one), plain(other)
    if not first or not second:
        return False
    if _tight(first) == _tight(second):
        return True
    if ("\\pm" in first) != ("\\pm" in second):
        first, second = (_both_signs(part) for part in (first, second))
    if ";" in first or ";" in second:
        return _same_parts(first.split(";"), second.split(";"), ordered=True)
    if _equation(first) and _equation(second):
        return _same_equation(first, second)
    first, second = (
        _ASSIGNED.sub("", part) if len(_top_level(part)) == 1 else part for part in (first, second)
    )
    if _tight(first) == _tight(second):
        return True
    first, second = (_as_interval(part) for part in (first, second))
    groups = [_group(part) for part in (first, second)]
    if groups[0] is not None or groups[1] is not None:
        return _same_groups(groups[0], groups[1], first, second)
    words = [normalised_words(part) for part in (first, second)]
    if not any(re.search(r"[\d\\]", part) for part in (first, second)) and words[0] == words[1]:
        return True
    return _equal_formulas(first, second)


def _as_interval(text: str) -> str:
    r"""An inequality as an interval: "1 \\le x < 2" is "[1, 2)"."""
    sides = re.split(r"(\\le(?![a-z])|\\ge(?![a-z])|<|>|\\lt(?![a-z])|\\gt(?![a-z]))", text)
    signs = [{"\\le": "<=", "\\ge": ">=", "\\lt": "<", "\\gt": ">"}.get(s, s) for s in sides[1::2]]
    parts = [side.strip() for side in sides[::2]]
    if len(parts) == 3 and parts[1].isalpha() and signs[0][0] == signs[1][0]:
        if signs[0][0] == ">":
            parts, signs = parts[::-1], [sign.replace(">", "<") for sign in signs[::-1]]
        low, high = "[" if "=" in signs[0] else "(", "]" if "=" in signs[1] else ")"
        return f"{low}{parts[0]},{parts[2]}{high}"
    if len(parts) == 2 and re.fullmatch("[a-z]", parts[0]):
        closed = "=" in signs[0]
        if signs[0][0] == "<":
            return f"(-\\infty,{parts[1]}{']' if closed else ')'}"
        return f"{'[' if closed else '('}{parts[1]},\\infty)"
    return text


def _both_signs(text: str) -> str:
    """The two values of a result with one plus-minus, as a list."""
    if "\\pm" not in text:
        return text
    return ", ".join(text.replace("\\pm", sign) for sign in "+-")


def is_mathematical(text: str) -> bool:
    """Whether a text is a formula or a number, not words."""
    bare = re.sub(r"\\[A-Za-z]+", "", plain(text))
    return bool(re.search(r"[\d\\]", text)) and not re.search(r"[A-Za-z]{3}", bare)


def plain(text: str) -> str:
    r"""A result without typography, units and surrounding dollar signs."""
    text = with_fractions(_SPACED.sub(lambda m: re.sub(r"\D", "", m[0]), text))
    text = _SCALED.sub(lambda m: f"*10^{_SCALES[m[1]]}", _APPROXIMATE.sub("", text))
    text = re.sub(r"(?<=\d)[eE]([-+]?\d+)(?![\w.])", r"*10^{\1}", text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    text = re.sub(r"\\textcircled\s*\{?(\d)\}?", lambda m: chr(0x245F + int(m[1])), text)
    text = (
        text.replace("~", " ")
        .replace("\\\\", "⏎")
        .replace("{,}", ",")
        .replace(",\\!", ",")
        .replace("\\!", "")
    )
    text = re.sub(r"(?<![\\A-Za-z])sqrt(?![A-Za-z])", r"\\sqrt ", text)
    for sign, latex in {"−": "-", "√": "\\sqrt ", "π": "\\pi ", "∞": "\\infty ", "°": ""}.items():
        text = text.replace(sign, latex)
    text = text.replace("×", "*").replace("·", "*").replace("≤", "\\le ").replace("≥", "\\ge ")
    text = re.sub(r"\\(?:\(|\)|\[|\])|(?<!\\)\$", "", text).replace("\\$", "").replace("\\%", "")
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})(?!\w)|\\degree", "", text).replace("%", "")
    text = re.sub(r"\\[dtc]frac(?![a-z])", r"\\frac", text).replace("\\leq", "\\le")
    text = text.replace("\\geq", "\\ge").replace("+\\infty", "\\infty").replace("\\{", "⟨")
    text = _FONT.sub(r"\1", _SPACING.sub(" ", text.replace("\\}", "⟩")))
    if _TEXT.sub("", text).strip(" .,^0123456789{}") or re.search(r"\d", _TEXT.sub("", text)):
        text = _TEXT.sub(lambda m: m[1] if m[1].strip() in ("and", "or") else " ", text)
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = _UNITS.sub("", text.strip()).strip().rstrip(".,;").strip()
    words = in_words(text) if not re.search(r"[\d\\]", text) else []
    whole = len(words) == 1 and words[0][:2] == (0, len(text))
    return str(words[0][2]) if whole else text


def _tight(text: str) -> str:
    return re.sub(r"[\s{}]|\\(?![A-Za-z])", "", text)


def _of_line(text: str, blanks: int) -> str | None:
    """The result at the start of a mark's span."""
    first = sentences(text)[0] if sentences(text) else ""
    if re.match(r"(?:in)?correct\b|right\b|wrong\b", first):
        return None
    formulas = [next(g for g in m.groups() if g) for m in _MATHS.finditer(first)]
    if formulas:
        between = _MATHS.sub("$", first).strip().rstrip(".")
        if blanks <= 1 and re.fullmatch(r"\$(?:\s*(?:,|or|and|,\s*and|,\s*or)\s*\$)+", between):
            ends = [_right_side(formula) for formula in formulas]
            again = all(same_value(ends[0], end) for end in ends)
            return ends[0] if again else ", ".join(ends)
        return ";".join(formulas[-blanks:]) if blanks > 1 else _right_side(formulas[0])
    return _right_side(first.strip().rstrip(".。").strip("*` "))


def concluded_value(sentence: str, blanks: int = 1) -> str | None:
    """The result of the last formula of a sentence, or its last number."""
    formulas = [next(g for g in m.groups() if g) for m in _MATHS.finditer(sentence)]
    if formulas:
        return ";".join(formulas[-blanks:]) if blanks > 1 else _right_side(formulas[-1])
    numbers = re.findall(r"(?<![\w.√])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", sentence)
    if numbers or re.search(r"\d", sentence):
        return numbers[-1] if numbers else None
    worded = [
        each for start, end, each in in_words(sentence) if sentence[start:end] not in ("one", "One")
    ]
    return str(worded[-1]) if len(worded) == 1 else None


def _right_side(formula: str) -> str:
    """The end of a chain of equations; a single equation with letters stays as it is."""
    if _SEVERAL.search(formula):
        return formula
    left, _, right = formula.partition("=")
    if formula.count("=") == 1 and (
        letters_in(right) or letters_in(re.sub(r"\\[A-Za-z]+", "", left))
    ):
        return formula
    return formula.rpartition("=")[2].strip()


def _equation(text: str) -> bool:
    return (text.count("=") == 1 and not _ASSIGNED.match(text)) or bool(
        re.fullmatch(r"\s*[xy]\s*=.*[a-z].*", text)
    )


def _same_equation(one: str, other: str) -> bool:
    r"""Whether two equations have the same zeros: the differences of sides are proportional."""
    sides = [part.split("=") for part in (one, other)]
    letters = sorted(letters_in(one) | letters_in(other))
    ratios = []
    for shift in range(3):
        values = _letter_values(letters, shift)
        found = [value(f"({left})-({right})", values) for left, right in sides]
        if found[0] is None or found[1] is None or found[1] == 0:
            return False
        ratios.append(found[0] / found[1])
    return all(abs(ratio - ratios[0]) <= 1e-6 * abs(ratios[0]) for ratio in ratios)


def _equal_formulas(one: str, other: str) -> bool:
    letters = sorted(letters_in(one) | letters_in(other))
    for shift in range(3 if letters else 1):
        values = _letter_values(letters, shift)
        first, second = value(one, values), value(other, values)
        if first is None or second is None:
            return False
        if abs(first - second) > _TOLERANCE * max(1.0, abs(first), abs(second)):
            return False
    return True


def _letter_values(letters: Sequence[str], shift: int) -> dict[str, complex]:
    values = {
        letter: _POINTS[0][0] + 0.3719 * place + 0.5231 * shift
        for place, letter in enumerate(letters)
    }
    return {letter: complex(each) for letter, each in values.items()} | {"pm": cmath.exp(0.37)}


def _group(text: str) -> tuple[str, list[str]] | None:
    """(brackets, parts) of an interval, tuple, set or list; None if the text is a single value."""
    text = text.strip()
    if "\\cup" in text:
        return "u", text.split("\\cup")
    matrix = re.fullmatch(r"\\begin\{[a-z]*matrix\}(.*)\\end\{[a-z]*matrix\}", text, re.DOTALL)
    if matrix:
        return "m", re.split(r"⏎|&", matrix[1])
    parts = _top_level(text)
    if len(parts) > 1:
        letters = [part.partition("=")[0].strip() for part in parts if "=" in part]
        point = len(set(letters)) == len(parts) and all(re.fullmatch("[a-z]", x) for x in letters)
        return "()" if point else "", parts
    if len(text) > 1 and text[0] in "([⟨" and text[-1] in ")]⟩":
        inside = _top_level(text[1:-1])
        if len(inside) > 1 or text[0] == "⟨":
            return text[0] + text[-1], inside
    return None


def _top_level(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    text = re.sub(r"(?<!\\)\b(?:and|or)\b", ",", text)
    for place, sign in enumerate(text):
        depth += (sign in "([{⟨") - (sign in ")]}⟩")
        if sign == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _same_groups(
    first: tuple[str, list[str]] | None,
    second: tuple[str, list[str]] | None,
    one: str,
    other: str,
) -> bool:
    if first is None or second is None:
        found = first or second
        # A set of one element equals the element; other groups are more than one value.
        if found is None or len(found[1]) != 1:
            return False
        return same_value(found[1][0], other if first is not None else one)
    loose = {"", "⟨⟩", "u"}
    if first[0] != second[0] and not {first[0], second[0]} <= {"", "⟨⟩"}:
        return False
    return _same_parts(first[1], second[1], ordered=first[0] not in loose)


def _same_parts(one: Sequence[str], other: Sequence[str], *, ordered: bool) -> bool:
    if len(one) != len(other):
        return False
    if ordered:
        return all(same_value(a, b) for a, b in zip(one, other, strict=True))
    left = list(other)
    for part in one:
        match = next((each for each in left if same_value(part, each)), None)
        if match is None:
            return False
        left.remove(match)
    return True
