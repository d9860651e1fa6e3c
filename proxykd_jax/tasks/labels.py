"""Labels of choices in a text: "B", "(B)", "(A), C and (D)"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from proxykd_jax.tasks import choice_patterns as patterns
from proxykd_jax.texts.normalise import normalised_words

Choices = Sequence[tuple[str, str]]


def labels_throughout(text: str, choices: Choices) -> str | None:
    """The labels of "(A) city, (C) street"; "" if joined by "or", None for fewer than two."""
    labels = [label for label, _ in choices]
    places = [(m, as_label(m[1], choices)) for m in patterns.BRACKETED.finditer(text)]
    found = [(match, label) for match, label in places if label is not None]
    if len({label for _, label in found}) < 2:
        listed = re.fullmatch(r"[(\[{]?\s*([A-Z](?:\s*[,;、]\s*[A-Z])+)\s*[)\]}]?", text.strip())
        said = re.findall("[A-Z]", listed[1]) if listed else []
        if said and set(said) <= set(labels):
            return "".join(sorted(set(said), key=labels.index))
        return None
    between = text[found[0][0].end() : found[-1][0].start()]
    if patterns.OR.search(between):
        return ""
    return "".join(sorted({label for _, label in found}, key=labels.index))


def labels_at_start(text: str, choices: Choices) -> str | None:
    """The labels at the start of a text, after words such as "option" or "I think".

    Returns:
      "" if two are joined by "or"; None if there is none, or all of them are called wrong.
    """
    start = patterns.LEAD.match(text)
    place = start.end() if start else 0
    place = patterns.LEAD_CHINESE.match(text, place).end()  # type: ignore[union-attr]
    labels = [label for label, _ in choices]
    run = patterns.RUN.match(text, place)
    if run and set(run[0]) <= set(labels) and list(run[0]) == sorted(set(run[0])):
        return run[0]
    spaced = patterns.SPACED.match(text, place)
    if (
        spaced
        and set(spaced[0]) <= {*labels, " "}
        and spaced[0].split() == sorted(set(spaced[0].split()))
    ):
        return spaced[0].replace(" ", "")
    found: list[str] = []
    while (match := _label_at(text, place, choices, first=not found)) is not None:
        label, place = match
        found.append(label)
        place = after_own_text(text, place, dict(choices)[label])
        joined = patterns.JOINED.match(text, place)
        assert joined is not None
        next_place = patterns.NAMED.match(text, joined.end()).end()  # type: ignore[union-attr]
        following = _label_at(text, next_place, choices, first=False)
        if following is None or (not joined[0].strip() and joined[0]):
            break
        if patterns.OR.search(joined[0]) and following[0] != label:
            return ""
        if re.match(rf"[.)]?\s*{patterns.FINITE}\b", text[following[1] :]):
            denied = patterns.DENIED_AFTER.search(text[following[1] :][:60])
            if denied and "and" in joined[0]:  # "A, B and D are wrong"
                return None
            if denied or "and" not in joined[0]:
                break
        place = next_place
    if not found or (len(found) == 1 and patterns.IS_WRONG_NOW.match(text, place)):
        return None
    return "".join(sorted(set(found), key=labels.index))


def after_own_text(text: str, place: int, choice: str) -> int:
    """The position after a label's own text: of "(C) city or (D)" that before " or"."""
    own = re.escape(choice.strip().rstrip("."))
    match = re.compile(rf"[.:,)\s-]*(?:the\s+|an?\s+)?[\"']?{own}[\"'.]?", re.IGNORECASE).match(
        text, place
    )
    return match.end() if match and own else place


def _label_at(text: str, place: int, choices: Choices, *, first: bool) -> tuple[str, int] | None:
    """A label at a position, and the position of its end."""
    for pattern in (patterns.BRACKETED, patterns.BARE, patterns.LOWER):
        match = pattern.match(text, place)
        if match is None:
            continue
        said = next(group for group in match.groups() if group)
        label = as_label(said, choices)
        if label is None:
            continue
        if pattern is patterns.BARE and not _is_label(
            said, label, text[match.end() :], choices, first
        ):
            continue
        if pattern is patterns.LOWER and not first:
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
        return (
            re.match(
                rf"\s*(?:$|[^\w\s]|[\u3040-\u9fff]|(?:and|or|because|since|{patterns.FINITE})\b)",
                rest,
            )
            is not None
        )
    if said in ("A", "I") or said.isdigit():
        if patterns.AFTER_LABEL.match(rest) or re.match(r"\s*[\u3040-\u9fff\uac00-\ud7af]", rest):
            return True
        own = normalised_words(dict(choices)[label])
        return bool(own) and normalised_words(rest)[: len(own)] == own
    return True
