r"""Which of a question's choices a text names: "(B)", "B.", "Option B", "\boxed{B}", "city".

A question may have several right choices, so the result is the labels in order: "B", "ACD". A text
that names two with "or" chooses none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from proxykd_jax.tasks.final_answer import (
    bold_spans,
    closing_sentences,
    marked_spans,
    sentences,
    unwrapped,
    without_emphasis,
)
from proxykd_jax.tasks.maths import concluded_value, is_mathematical, same_value
from proxykd_jax.texts.normalise import normalised_words

Choices = Sequence[tuple[str, str]]

_LEAD = re.compile(
    r"[\s:;,.\-–—>\"'“”‘’`*]*(?:(?:the|letter|option|choice|answer|statement|number|alternative|"
    r"most\s+likely|probably|likely|definitely|clearly|therefore|thus|either|both|options|choices|"
    r"statements|answers|选项|选|为|是)(?![\w])[\s:\"'“‘`*]*)*",
    re.IGNORECASE,
)
_LEAD_CHINESE = re.compile(r"[选项为是\s:]*")
_JOINED = re.compile(r"\s*(?:,|、|;|/|&|\+)?\s*(?:\b(?:and|or)\b|和|及|与|或)?\s*", re.IGNORECASE)
_BRACKETED = re.compile(r"[(\[]\s*([A-Za-z0-9])\s*[)\]]")
_BARE = re.compile(r"(?<![\w\\])([A-Z0-9])(?![\w'’])")
_LOWER = re.compile(r"([a-z])\s*[).:]?\s*$|([a-z])\)")
_RUN = re.compile(r"(?<!\w)[A-Z]{2,}(?!\w)")
_CALLED_RIGHT = re.compile(
    r"(?:(?:[(\[]([A-Za-z0-9])[)\]]|(?i:\b(?:option|choice|answer|statement)\s+)([A-Z0-9])\b)"
    r"(?:[.:,]?\s+[^.\n]{1,80}?)?|(?<!\w)([A-Z0-9]))\s+(?:is|are)\s+"
    r"(?:indeed\s+|therefore\s+|clearly\s+)?(?:the\s+)?(?:only\s+)?"
    r"(?:(?:most\s+)?(?:correct|right|best|appropriate|accurate|answer|true)|most\s+likely)\b"
    r"|(?<!\w)([A-Z])\s*(?:选项|项)?\s*(?:正确|符合题意|说法正确)"
)
_OPTION = re.compile(r"(?i:\b(?:option|choice|answer|选项)\s*)[(\[]?([A-Z0-9])[)\]]?(?!\w)")
_EXCLUDES = re.compile(
    r"\b(?:eliminat\w*|incorrect|wrong|rule[sd]?\s+out|neither|nor|unlikely|exclud\w*|irrelevant|"
    r"result(?:s|ed)?\s+(?:from|of)|errors?)\b",
    re.IGNORECASE,
)
_NEGATES = re.compile(r"\b(?:not|except|cannot|none)\b|n't\b", re.IGNORECASE)
_ONLY_LABELS = re.compile(
    r"[A-Z]{2,}[.)]?|(?:[(\[]?[A-Z0-9][)\]]?[\s,、;/&]*(?:and\s+)?){2,}[.。]?"
)
# What may follow a bare "A" or "I" that is a label and not a word.
_AFTER_LABEL = re.compile(
    r"\s*(?:$|[^\w\s]|(?:because|since|as|is|are|and|or|for|due|with|which)\b)"
)


def choice_in(output: str, choices: Choices) -> str | None:
    """The labels that a text gives as its final answer; None if it gives none.

    Tried in this order: the choice that the last mark points at, by label or by text; the choice
    that the whole text or its first line consists of; the one called correct, or in bold at the
    end; the only choice named by the last sentences of the last paragraph.

    Args:
      output: a text from ``cleaned``.
      choices: (label, text) of each choice.
    """
    text = without_emphasis(output)
    for span in marked_spans(text):
        found = named(span.text, choices, whole=span.boxed)
        if found is not None:
            return found or None
    if (found := _as_a_whole(text, choices)) is not None:
        return found or None
    if (found := _called_right(text, choices)) is not None:
        return found
    for part in bold_spans(output):
        if (found := named(part, choices)) is not None:
            return found or None
    for sentence in closing_sentences(_without_list(text, choices)):
        if (found := _concluded(sentence, choices)) is not None:
            return found or None
    return None


def named(span: str, choices: Choices, *, whole: bool = False) -> str | None:
    """The labels at the start of a span, or otherwise the one choice whose text it contains.

    Args:
      whole: the span is nothing but an answer, so letters in it are labels.

    Returns:
      "" if it names several without deciding; None if it names none.
    """
    text = unwrapped(span)
    if whole and (several := _labels_throughout(text, choices)) is not None:
        return several
    found = _labels_at_start(text, choices, whole=whole)
    if found is not None:
        return found
    first = text if whole else (sentences(text) or [""])[0]
    return _by_text(first, choices)


def _labels_throughout(text: str, choices: Choices) -> str | None:
    """The labels of "(A) city, (C) street"; "" if joined by "or", None for fewer than two."""
    labels = [label for label, _ in choices]
    places = [(m, as_label(m[1], choices)) for m in _BRACKETED.finditer(text)]
    found = [(match, label) for match, label in places if label is not None]
    if len({label for _, label in found}) < 2:
        return None
    between = text[found[0][0].end() : found[-1][0].start()]
    if re.search(r"\bor\b|或", between):
        return ""
    return "".join(sorted({label for _, label in found}, key=labels.index))


def _labels_at_start(text: str, choices: Choices, *, whole: bool) -> str | None:
    start = _LEAD.match(text)
    place = start.end() if start else 0
    place = _LEAD_CHINESE.match(text, place).end()  # type: ignore[union-attr]
    labels = [label for label, _ in choices]
    run = _RUN.match(text, place)
    if run and set(run[0]) <= set(labels) and list(run[0]) == sorted(set(run[0])):
        return run[0]
    found: list[str] = []
    disjoined = False
    while (match := _label_at(text, place, choices, first=not found, whole=whole)) is not None:
        label, place = match
        found.append(label)
        joined = _JOINED.match(text, place)
        assert joined is not None
        disjoined |= bool(re.search(r"\bor\b|或", joined[0]))
        following = _label_at(text, joined.end(), choices, first=False, whole=whole)
        if following is None:
            break
        if re.search(r"\bor\b|或", joined[0]) and following[0] != label:
            return ""
        place = joined.end()
    if not found:
        return None
    return "".join(sorted(set(found), key=labels.index))


def _label_at(
    text: str, place: int, choices: Choices, *, first: bool, whole: bool
) -> tuple[str, int] | None:
    """A label at a position, and the position of its end."""
    for pattern in (_BRACKETED, _BARE, _LOWER):
        match = pattern.match(text, place)
        if match is None:
            continue
        said = next(group for group in match.groups() if group)
        label = as_label(said, choices)
        if label is None:
            continue
        if pattern is _BARE and not _is_label(said, label, text[match.end() :], choices, first):
            continue
        if pattern is _LOWER and not (first and (whole or match[2] or place == 0 or match[1])):
            continue
        return label, match.end()
    return None


def as_label(said: str, choices: Choices) -> str | None:
    """The label that is meant; letters also stand for choices that have numbers as labels."""
    labels = [label for label, _ in choices]
    said = said.upper()
    if said in labels:
        return said
    place = ord(said) - ord("A")
    return labels[place] if all(x.isdigit() for x in labels) and 0 <= place < len(labels) else None


def _is_label(said: str, label: str, rest: str, choices: Choices, first: bool) -> bool:
    """Whether a bare letter or digit is a label, and not the article, a number or "I"."""
    if re.match(r"[.,]\d|\s*[%=+*/^<>]|-\w", rest):
        return False
    if not first:
        return re.match(r"\s*(?:$|[^\w\s]|and\b|or\b|because\b|since\b)", rest) is not None
    if said in ("A", "I") or said.isdigit():
        if _AFTER_LABEL.match(rest):
            return True
        own = normalised_words(dict(choices)[label])
        return bool(own) and normalised_words(rest)[: len(own)] == own
    return True


def _by_text(text: str, choices: Choices) -> str | None:
    """The only choice whose text a span contains, in words or as a value."""
    words = normalised_words(text)
    texts = {label: normalised_words(choice) for label, choice in choices}
    exact = [label for label, choice in texts.items() if choice and choice == words]
    if len(exact) == 1:
        return exact[0]
    if is_mathematical(text) or any(is_mathematical(choice) for _, choice in choices):
        equal = [label for label, choice in choices if same_value(text, choice)]
        if len(equal) == 1:
            return equal[0]
        if not re.search(r"[A-Za-z]{3}", text):
            return None
    said = {label: choice for label, choice in texts.items() if _within(choice, words)}
    longest = [
        label
        for label, choice in said.items()
        if not any(other != label and _within(choice, said[other]) for other in said)
    ]
    if len(longest) != 1 or _denied(text, dict(choices)[longest[0]]):
        return None
    return longest[0]


def _within(part: Sequence[str], words: Sequence[str]) -> bool:
    size = len(part)
    return bool(size) and any(words[i : i + size] == part for i in range(len(words) - size + 1))


def _denied(text: str, choice: str) -> bool:
    negated = bool(_NEGATES.search(text)) and not _NEGATES.search(choice)
    return negated or (bool(_EXCLUDES.search(text)) and not _EXCLUDES.search(choice))


def _called_right(text: str, choices: Choices) -> str | None:
    """The choice that is called correct in the last sentence that calls one so."""
    for sentence in sentences(unwrapped(text))[::-1]:
        if _NEGATES.search(sentence):
            continue
        said = [next(filter(None, match.groups())) for match in _CALLED_RIGHT.finditer(sentence)]
        labels = {label for label in (as_label(each, choices) for each in said) if label}
        if len(labels) == 1:
            return labels.pop()
    return None


def _as_a_whole(text: str, choices: Choices) -> str | None:
    """The answer of a text that is nothing but an answer: a label, "B. city", or a choice's text,
    perhaps with an explanation below. A text that starts to go through the choices does not count.
    """
    first, _, rest = text.partition("\n")
    plain = unwrapped(first)
    if _ONLY_LABELS.fullmatch(plain) and not rest:
        return _labels_at_start(plain, choices, whole=True)
    head = _BRACKETED.match(plain) or re.match(r"([A-Z0-9])\s*(?:[).:,]|$)", plain)
    label = as_label(head[1], choices) if head else None
    if head is not None and label is not None:
        others = re.match(r"\s*[(\[]?([A-Za-z0-9])[)\].:]", rest.lstrip())
        listed = others is not None and as_label(others[1], choices) not in (None, label)
        listed |= any(
            as_label(other, choices) not in (None, label) for other in _BRACKETED.findall(plain)
        )
        short = len(sentences(plain[head.end() :])) <= 1
        if not listed and (short or not rest):
            return _labels_at_start(plain, choices, whole=False)
    if re.fullmatch(r"[a-z][).]?", text.strip()):
        return as_label(text.strip()[0], choices)
    words = normalised_words(first if not rest.strip() else text)
    exact = [label for label, choice in choices if normalised_words(choice) == words]
    return exact[0] if len(exact) == 1 else None


def _without_list(text: str, choices: Choices) -> str:
    """The text without lines that only repeat the choices, if there are several such lines."""
    own = {(label, *normalised_words(choice)) for label, choice in choices}
    lines = text.split("\n")
    listed = [
        (match := re.match(r"\W*([A-Za-z0-9])\s*[).:\]]\s*(.*)", line)) is not None
        and (match[1].upper(), *normalised_words(match[2])) in own
        for line in lines
    ]
    if sum(listed) < 2:
        return text
    return "\n".join(line for line, is_choice in zip(lines, listed, strict=True) if not is_choice)


def _concluded(sentence: str, choices: Choices) -> str | None:
    """The only choice that a concluding sentence names, by label, words or value."""
    plain = unwrapped(sentence)
    if (alone := re.fullmatch(r"[(\[]?([A-Z0-9])[)\].:]*", plain)) is not None:
        return as_label(alone[1], choices)
    if _EXCLUDES.search(plain):
        return None
    if _NEGATES.search(plain) and not any(_NEGATES.search(text) for _, text in choices):
        return None
    found = [match[1] for match in _BRACKETED.finditer(plain)]
    found = found or [match[1] for match in _OPTION.finditer(plain)]
    labels = {label for label in (as_label(each, choices) for each in found) if label}
    if labels:
        return labels.pop() if len(labels) == 1 else None
    if any(is_mathematical(text) for _, text in choices):
        value = concluded_value(sentence)
        equal = [label for label, text in choices if value and same_value(value, text)]
        if len(equal) == 1:
            return equal[0]
    return _by_text(plain, choices)
