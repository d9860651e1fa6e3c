r"""Numbers in a model's text: ``$1,234.50``, ``-3``, ``\frac{1}{2}``, ``2 + 3 = 5``, ``1.2e3``."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from proxykd_jax.tasks import number_patterns as patterns
from proxykd_jax.tasks.expression import value
from proxykd_jax.tasks.final_answer import (
    Statement,
    bold_spans,
    closing_sentences,
    decide,
    refused,
    refuses,
    sentences,
    without_emphasis,
)
from proxykd_jax.tasks.number_words import SCALES, in_words, part_after


class Number(NamedTuple):
    """A number with its place in a text."""

    value: Fraction
    start: int
    end: int
    ordinal: bool = False


def number_in(output: str, question: str = "") -> str | None:
    """The number that a text gives as its final answer, in canonical form; None if it gives none.

    The number of the last final statement. Without statements, the only bold number of the last
    paragraph. Otherwise that of the last sentence with a number: what follows its "=", or its last
    number, except those that say when, for how many or what is not ("in 1 week", "not 5").

    Args:
      output: a text from ``cleaned``.
      question: "How many dozens" asks for a number of dozens, and "how many minutes" for minutes.
    """
    text = _readable(output)
    decided, found = decide(
        without_emphasis(text), lambda statement: _of_statement(statement, question)
    )
    if decided:
        return found
    if alone := patterns.EXPLAINED.match(text):
        found = canonical(alone[1].strip("*"))
        if found is not None:
            return found
    bold = {found for part in bold_spans(text) if (found := _of_text(part, question))}
    if len(bold) == 1:
        return bold.pop()
    text = without_emphasis(text)
    closing = closing_sentences(text)
    if len(sentences(text)) == 1 and patterns.AMOUNT.fullmatch(text):
        return _of_text(text, question) or None
    for sentence in closing:
        if refuses(sentence):
            return None
        if (found := _concluded(sentence, question)) is not None:
            return found or None
    for sentence in sentences(text)[::-1] if closing else []:
        if (found := _concluded(sentence, question)) is not None:
            return found or None
    return None


def canonical(text: str) -> str | None:
    """The canonical form of a text that is one number: "$1,050.00" is "1050"; otherwise None.

    Integers and finite decimals are written out; other fractions look like "1/3".
    """
    found = _numbers(_readable(text))
    return _text(found[0].value) if len(found) == 1 else None


def _readable(text: str) -> str:
    text = patterns.BULLET_NUMBER.sub("", patterns.ENDLESS.sub(" ", text))
    text = patterns.WHICH_IS.sub(r"\1 = ", patterns.MINUS.sub(r"\1-", text))
    text = patterns.AND_CENTS.sub(lambda m: f"{m[1]}.{m[2]:0>2}", text)
    text = patterns.CALCULATION.sub(lambda m: m[2] or m[1].rpartition("=")[2], text)
    text = text.replace("{,}", ",").replace("\\!", "")
    text = re.sub(r"(?<=\d)(?:,?\\[,;: ]|~)(?=\d{3})", "", text)
    text = re.sub(r"\\[,;:]|~", " ", text)
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = with_fractions(text)
    text = patterns.FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = re.sub(r"\\(?:times|cdot)(?![a-z])|·", "×", text).replace("\\div", "÷")
    text = re.sub(r"(?<=\d)\s+x\s+(?=[$\d(])", " × ", text)
    # Other LaTeX becomes a separator, so that "\text{ab}5" and "$-3$" can be read.
    text = re.sub(
        r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|mbox|rm)\s*\{([^{}]*)\}", r" \1", text
    )
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\degree", "°", text)
    text = patterns.POWER_OF_UNIT.sub("", text)
    text = re.sub(
        r"(?<=\d)[⁻⁰¹²³⁴-⁹]+",
        lambda m: "^" + unicodedata.normalize("NFKC", m[0]).replace("\u2212", "-"),
        text,
    )
    text = patterns.CLOCK.sub(" time ", patterns.ON_THE_HOUR.sub(r"\1", text))
    return re.sub(r"\$(?=\D)(?![-.]\d|\s?\d)", " ", text)


def with_fractions(text: str) -> str:
    r"""A text with ½ as "1/2" and recurring decimals as fractions: "0.\overline{3}" is "1/3"."""
    text = re.sub(r"[\u00bc-\u00be\u2150-\u215e]", _spelled, text)
    return patterns.RECURRING.sub(_as_fraction, text)


def _spelled(match: re.Match[str]) -> str:
    """A sign such as ½ in ASCII."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")


def _as_fraction(match: re.Match[str]) -> str:
    r"""A recurring decimal, "0.1\overline{6}", as a fraction, "1/6"."""
    again = (match[3] or match[4] or match[5]).replace("\u0305", "")
    found = _recurring(match[1] or "0", match[2], again)
    return f"{found.numerator}/{found.denominator}"


def _of_statement(statement: Statement, question: str) -> str | None:
    text = statement.first
    if statement.denied or statement.form == "refusal":
        return None
    refusal = refused(text)
    before = text if refusal is None else text[:refusal]
    return _of_text(text, question) if refusal is None or re.search(r"\d", before) else None


def _of_text(text: str, question: str) -> str | None:
    """The number that an answer's text gives; "" for a range, None if it has no number.

    The number at its start; otherwise the end of its chain of equations.
    """
    restated = patterns.RESTATED.search(_without_asides(text))
    if restated and _numbers(text[restated.end() :]):
        text = text[restated.end() :]
    found = _numbers(text, question)
    if found and (_is_range(text) or _is_formula(text)):
        return ""
    leading = found[0] if found else None
    if leading and patterns.STANDS_ALONE.fullmatch(text[: leading.start]):
        compound = _compound(text[leading.start :], question)
        if compound is not None and "=" not in text:
            return compound
        if compound is None and not _goes_on(text[leading.end :]):
            return _text(leading.value)
    parts = [
        part
        for part in re.split(r"=|≈|\\approx|\b(?:equals|is|makes|gives)\b", text)
        if part.strip()
    ]
    for part in parts[::-1]:
        inside = _numbers(part, question)
        if "\\sqrt" in part and (computed := _computed(part)) is not None:
            return computed
        if (
            len(inside) == 1
            and not patterns.OPERATOR.match(part, inside[0].end)
            and not re.search(r"[-+*/×÷^]\s*$", part[: inside[0].start])
        ):
            return _text(inside[0].value)
    for part in parts[::-1]:
        if (computed := _computed(part)) is not None:
            return computed
    for part in parts[::-1]:
        if inside := _numbers(part, question):
            return _text(inside[0].value)
    return None


def _is_formula(text: str) -> bool:
    """Whether the end of a chain of equations has letters: "2550 - 5x"."""
    end = re.sub(r"(?<=\d)[eE][-+]?\d+", "", text.rpartition("=")[2])
    return patterns.FORMULA.search(end) is not None


def _goes_on(text: str) -> bool:
    """Whether a text goes on a calculation: "+ 3", "x 4", "km = 2000 m"."""
    return patterns.OPERATOR.match(text) is not None or patterns.UNIT_EQUALS.match(text) is not None


def _is_range(text: str) -> bool:
    """Whether a text gives two numbers without deciding: "18 or 20", "between 3 and 4", "3-5"."""
    main = patterns.NOT_THESE.sub("", _without_asides(text))
    text = main if _numbers(main) else text
    if patterns.RANGE.search(text):
        return True
    if patterns.LIST.fullmatch(text):
        return True
    hyphened = patterns.HYPHENED.search(text)
    return (
        hyphened is not None and "=" not in text and Fraction(hyphened[1]) < Fraction(hyphened[2])
    )


def _compound(text: str, question: str) -> str | None:
    """An amount in two units, "5 hours and 30 minutes", in the unit that the question asks for.

    Dollars and cents are dollars unless it asks for cents. Other amounts are "" if it asks for
    neither unit; None if the text begins with no such amount.
    """
    match = patterns.COMPOUND.match(text)
    if match is None:
        return None
    names = [_unit(match[2]), _unit(match[4])]
    known = [patterns.UNITS.get(name) for name in names]
    if known[0] is None or known[1] is None or known[0][0] != known[1][0] or names[0] == names[1]:
        return None
    total = sum(
        Fraction(amount.replace(",", "")) * unit[1]
        for amount, unit in zip((match[1], match[3]), known, strict=True)
        if unit is not None
    )
    asked = [_unit(word) for word in re.findall(r"[A-Za-z]+", question.lower())]
    wanted = [name for name in asked if name in names]
    name = wanted[-1] if wanted else "dollar" if "dollar" in names else None
    return "" if name is None else _text(total / patterns.UNITS[name][1])


def _unit(word: str) -> str:
    word = word.lower()
    word = patterns.PLURAL.get(word, word.removesuffix("s"))
    return patterns.PLURAL.get(word, word)


def _computed(text: str) -> str | None:
    """The value of a text that is nothing but arithmetic, perhaps with a unit behind it."""
    plain = re.sub(r"[$€£¥,]", "", text).replace("×", "*").replace("÷", "/")
    plain = re.sub(r"(?<=\d)\s*x\s*(?=[\d(])", "*", plain)
    plain = re.sub(r"(?<=[\d)])\s*[A-Za-z°% ]*[.!]?\s*$", "", plain).strip()
    plain = re.sub(r"(?<=\d)\s*[A-Za-z]+(?=\s*[-+])", "", plain)
    plain = re.sub(r"^(?:[A-Za-z]+\s+)*(?=[\d(-])", "", plain).rstrip(".!")
    if not re.fullmatch(r"(?:\\(?:sqrt|frac)|[-\d.+*/^(){}\s])+", plain) or not re.search(
        r"\d", plain
    ):
        return None
    found = value(plain, {})
    if found is None or found.imag or abs(found) > 1e15:
        return None
    return _text(Fraction(found.real).limit_denominator(10**6))


def _concluded(sentence: str, question: str) -> str | None:
    """The number of a concluding sentence; "" for a formula, None if it has no number."""
    sentence = patterns.NUMBERED_TITLE.sub("", sentence)
    if (restated := patterns.RESTATED.search(_without_asides(sentence))) and _numbers(
        sentence[restated.end() :]
    ):
        sentence = sentence[restated.end() :]
    if _is_formula(sentence):
        return ""
    if patterns.RANGE.search(sentence) and len(_numbers(sentence)) == 2:
        return ""
    premise = patterns.PREMISE.match(sentence)
    if premise and _chosen(sentence[premise.end() :], question):
        sentence = sentence[premise.end() :]
    for clause in patterns.CLAUSE.split(sentence)[::-1]:
        main = _without_asides(clause)
        if not _numbers(main):
            main = clause
        if (reason := patterns.REASON.search(main)) and _chosen(main[: reason.start()], question):
            main = main[: reason.start()]
        _, equals, after = main.rpartition("=")
        if equals and (found := _numbers(after, question)):
            left = [each for each in found if not patterns.DENIED.search(after[: each.start])]
            if left and (left[0] is not found[0] or not patterns.GOES_ON.match(after, left[0].end)):
                return _text(left[0].value)
            return _computed(after) or ""
        for explained in patterns.EXPLAINS.finditer(main):
            before = main[: explained.start()]
            figures = re.search(r"\d", before) or not re.search(r"\d", main)
            if figures and _chosen(before, question) is not None:
                main = before
                break
        if patterns.CALCULATES.search(main) and (computed := _computed(main)) is not None:
            return computed
        # "the 3rd day" says which one; "18th" can be an answer only in a statement.
        chosen = _chosen(main, question)
        if chosen is None:
            chosen = _chosen(main, question, adjuncts=True)
        if chosen is not None:
            for each in patterns.COMPOUND.finditer(main):
                if each.start() <= chosen.start < each.end():
                    compound = _compound(main[each.start() :], question)
                    if compound is not None:
                        return compound
            return _text(chosen.value)
    return None


def _without_asides(text: str) -> str:
    """A text of the same length with spaces in place of what stands in brackets."""
    return re.sub(r"\([^()]*\)", lambda m: " " * len(m[0]), text)


def _chosen(text: str, question: str, *, adjuncts: bool = False) -> Number | None:
    """The last number of a clause that is not denied and no adjunct."""
    kept, last_adjunct = [], -1
    for each in _numbers(text, question):
        before = text[: each.start]
        after = text[each.end :]
        aged = re.match(r"-?\s*years?-\s*old", after)
        attribute = patterns.ARTICLE.search(before) and patterns.UNIT_AND_NOUN.match(after)
        if each.ordinal or aged or patterns.DENIED.search(before):
            continue
        if not adjuncts and (
            attribute
            or patterns.ADJUNCT.search(before)
            or (last_adjunct >= 0 and patterns.JOINED.fullmatch(text[last_adjunct : each.start]))
        ):
            last_adjunct = each.end
            continue
        kept.append(each)
    return kept[-1] if kept else None


def _numbers(text: str, question: str = "") -> list[Number]:
    """The numbers of a text in order, in figures; those in words only if there are no others."""
    found = [
        Number(_value(match, question), match.start(), match.end(), bool(match["ordinal"]))
        for match in patterns.NUMBER.finditer(text)
    ]
    if not found:
        found = [Number(each, start, end) for start, end, each in in_words(text)]
        if _asks_for_dozens(question):
            found = [
                each._replace(value=each.value / 12)
                if re.search(r"\bdozen", text[each.start : each.end], re.IGNORECASE)
                else each
                for each in found
            ]
    return found


def _asks_for_dozens(question: str) -> bool:
    return re.search(r"\bdozens?\b", question.rpartition(".")[2], re.IGNORECASE) is not None


def _value(match: re.Match[str], question: str) -> Fraction:
    whole = re.sub(r"[ ',]", "", match["whole"]) or "0"
    if whole.count(".") > 1 or (whole.count(".") and match["part"].startswith(",")):
        whole = whole.replace(".", "")
    found = Fraction(whole + match["part"].replace(",", "."))
    if match["dots"] and (again := re.search(r"(\d+?)\1+$", match["part"])):
        found = _recurring(whole, match["part"][1 : again.start()], again[1])
    found *= Fraction(10) ** max(-99, min(99, int(match["exponent"] or match["power"] or 0)))
    if match["below"] and int(match["below"]):
        found /= int(match["below"])
    if match["lower"] and int(match["lower"]):
        found += Fraction(int(match["upper"]), int(match["lower"]))
    if match["and"]:
        part = match["and"]
        found += Fraction(part) if part[0].isdigit() and part[-1] != "0" else part_after(part) or 0
    scale = (match["scale"] or "").lower().removesuffix("s")
    if scale and not (scale == "dozen" and _asks_for_dozens(question)):
        found *= SCALES[scale]
    letter = (match["letter"] or "").strip()
    if letter not in ("m", "b") or re.search("[$€£¥₹]", match[0]):  # "18m" is a length
        found *= patterns.LETTERS.get(
            letter.upper() if letter != "bn" and letter != "mn" else letter, 1
        )
    before = match.string[: match.start()].rstrip()
    binary = bool(before) and (before[-1].isdigit() or before[-1] in ")}%")
    return -found if match["minus"] or (match["sign"] and not binary) else found


def _recurring(whole: str, fixed: str, again: str) -> Fraction:
    """The value of a decimal whose last digits repeat without end."""
    above = int(whole + fixed + again) - int(whole + fixed)
    return Fraction(above, (10 ** len(again) - 1) * 10 ** len(fixed))


def _text(amount: Fraction) -> str:
    if amount.denominator == 1:
        return str(amount.numerator)
    below = amount.denominator
    while below % 2 == 0:
        below //= 2
    while below % 5 == 0:
        below //= 5
    if below != 1:
        return f"{amount.numerator}/{amount.denominator}"
    digits = 0
    while (amount * 10**digits).denominator != 1:
        digits += 1
    sign = "-" if amount < 0 else ""
    whole, part = divmod(abs(int(amount * 10**digits)), 10**digits)
    return f"{sign}{whole}.{part:0{digits}d}"
