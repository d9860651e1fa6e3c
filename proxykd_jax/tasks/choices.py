r"""Which of a question's choices a text names: "(B)", "B.", "Option B", "\boxed{B}", "city".

A question may have several right choices, so the result is the labels in order: "B", "ACD". A text
that names two with "or" chooses none.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence

from proxykd_jax.tasks import choice_patterns as patterns
from proxykd_jax.tasks.final_answer import (
    Statement,
    bold_spans,
    boxed_contents,
    closing_sentences,
    decide,
    last_paragraph,
    refuses,
    refuses_firmly,
    sentences,
    unwrapped,
    without_emphasis,
)
from proxykd_jax.tasks.labels import (
    Choices,
    after_own_text,
    as_label,
    labels_at_start,
    labels_throughout,
)
from proxykd_jax.tasks.maths import concluded_value, is_mathematical, same_value
from proxykd_jax.texts.normalise import normalised_words


def choice_in(output: str, choices: Choices, *, several: bool = False) -> str | None:
    """The labels that a text gives as its final answer; None if it gives none.

    Tried in this order: the last final statement, which decides; the choice that the whole text or
    its first line consists of; the one in bold at the end; the one that the last sentences of the
    last paragraph call right, or the only one that they name and do not deny; the last one that any
    sentence calls right.

    Args:
      output: a text from ``cleaned``.
      choices: (label, text) of each choice.
      several: several may be right, so that all boxes of the last line with a box count.
    """
    text = without_emphasis(output)
    if several and (found := _in_boxes(text, choices)):
        return found
    decided, found = decide(text, lambda statement: _read(statement, choices))
    if decided:
        return found
    lines = [patterns.ONE_LABEL.fullmatch(line) for line in text.split("\n") if line.strip()]
    if all(lines) and len({line[1] for line in lines if line}) > 1:
        return None
    if (found := _judged(text, choices) or _as_a_whole(text, choices)) is not None:
        return found or None
    for part in bold_spans(output):
        if (found := named(part, choices)) is not None:
            return found or None
    unlisted = _without_list(text, choices)
    closing = closing_sentences(unlisted)
    if (found := _verdicts(unlisted, choices)) is not None:
        return found
    brief = len(sentences(unlisted)) == 1
    for sentence in closing:
        if (found := _concluded(sentence, choices, brief=brief)) is not None:
            return found or None
        if refuses(sentence):
            return _label_of_refusal(choices)
    for sentence in sentences(unwrapped(text))[::-1]:
        if refuses_firmly(sentence):
            return _label_of_refusal(choices)
        considers = patterns.CONSIDERS.match(sentence)
        if not considers and (found := _called_right(sentence, choices)) is not None:
            return found
    return None


def _in_boxes(text: str, choices: Choices) -> str | None:
    """The labels of several boxes in the last line with a box; None if there are not several."""
    boxes = [
        [named(content, choices, whole=True) for _, content in boxed_contents(line)]
        for line in text.split("\n")
        if boxed_contents(line)
    ]
    if not boxes or len(boxes[-1]) < 2 or not all(boxes[-1]):
        return None
    found = {label for labels in boxes[-1] for label in labels or ""}
    return "".join(label for label, _ in choices if label in found)


def _read(statement: Statement, choices: Choices) -> str | None:
    if statement.denied:  # "not wrong" may be the text of a choice
        return _by_start(unwrapped(statement.first), choices)
    if statement.form == "refusal":
        return _label_of_refusal(choices)
    found = named(statement.text, choices, whole=statement.whole)
    if found is None and refuses(statement.first):
        return _label_of_refusal(choices)
    return found


_VERDICTS = {"true": True, "not wrong": True, "right": True, "false": False, "wrong": False}


def _label_of_refusal(choices: Choices) -> str | None:
    """The choice that says what a refusal says, such as "none of these"."""
    refusing = [label for label, text in choices if refuses(text)]
    return refusing[0] if len(refusing) == 1 else None


def named(span: str, choices: Choices, *, whole: bool = False) -> str | None:
    """The labels at the start of a span, or otherwise the one choice whose text it contains.

    Args:
      whole: the span is nothing but an answer, so letters in it are labels.

    Returns:
      "" if it names several without deciding; None if it names none.
    """
    text = unwrapped(span)
    if whole and (several := labels_throughout(text, choices)) is not None:
        return several
    first = text if whole else (sentences(text) or [""])[0]
    if (found := _by_whole(first, choices)) is not None:
        return found
    if leaves := patterns.LEAVES.search(first):
        text = first = first[leaves.end() :]
    found = labels_at_start(text, choices)
    if found == "":
        return _preferred(first, choices)
    if found is not None:
        return found
    if (ordinal := patterns.ORDINAL.search(first)) and not whole:
        return _at_place(ordinal[1], choices)
    labels = _mentioned(first, choices) if not patterns.CONSIDERS.match(first) else []
    if labels:
        return labels[0] if len(labels) == 1 else ""
    if (ends := patterns.ENDS_IN_LABEL.search(first)) and not patterns.EXCLUDES.search(first):
        return as_label(ends[1] or ends[2], choices)
    if (found := _by_text(first, choices)) is not None or not whole:
        return found
    return _by_words(first, choices)


def _at_place(ordinal: str, choices: Choices) -> str | None:
    place = patterns.PLACES.index(ordinal.lower())
    return choices[place][0] if place < len(choices) else None


def _preferred(text: str, choices: Choices) -> str:
    """The label after the last words of preference, "B or C, most likely C"; "" if none."""
    *_, last = [None, *patterns.PREFERS.finditer(text)]
    found = labels_at_start(text[last.end() :], choices) if last else None
    return found or ""


def _by_whole(text: str, choices: Choices) -> str | None:
    """The choice whose text is all of a span, perhaps after words such as "the" or "option"."""
    start = patterns.LEAD.match(text)
    negative = re.match(r"\W*-\s?[\d.\\]", text)
    for part in (text, text if negative or start is None else text[start.end() :]):
        exact = [label for label, choice in choices if _is_same(part, choice)]
        if len(exact) == 1:
            return exact[0]
    return None


def _is_same(text: str, choice: str) -> bool:
    """Whether a text has the words of a choice and no others; signs count in formulas."""
    words = normalised_words(text)
    same = bool(words) and words == normalised_words(choice)
    return same and (not is_mathematical(choice) or same_value(text.strip(" .!="), choice))


def _by_start(text: str, choices: Choices) -> str | None:
    """The choice with the longest text that begins a span."""
    words = normalised_words(text)
    texts = [(len(own), label) for label, choice in choices if (own := normalised_words(choice))
             and words[: len(own)] == own]  # fmt: skip
    return max(texts)[1] if texts else None


def _by_text(text: str, choices: Choices) -> str | None:
    """The only choice whose text a span contains, in words or as a value."""
    words = normalised_words(text)
    texts = {label: normalised_words(choice) for label, choice in choices}
    every = [label for label, choice in choices if patterns.ALL.match(choice)]
    if len(every) == 1 and patterns.ALL.search(text):
        return every[0]
    if is_mathematical(text) or any(is_mathematical(choice) for _, choice in choices):
        end = text.rpartition("=")[2].rstrip(" .")
        equal = [label for label, choice in choices if same_value(end, choice)]
        if len(equal) == 1:
            return equal[0]
        if not re.search(r"[A-Za-z]{3}", text):
            return None
    said = {
        label: texts[label]
        for label, choice in choices
        if _within(texts[label], words)
        and (not is_mathematical(choice) or _signs_agree(text, choice))
    }
    kept = [
        label
        for label, choice in said.items()
        if not any(other != label and _within(choice, said[other]) for other in said)
        and not _denied(text, dict(choices)[label], choices)
    ]
    return kept[0] if len(kept) == 1 else _pointed_at(text, kept, choices)


def _pointed_at(text: str, labels: Sequence[str], choices: Choices) -> str | None:
    """The one of several choices that a text points to: at its end, with "only", or after "so"."""
    found = set()
    for label in labels:
        for match in re.finditer(
            rf"(?<!\w){re.escape(dict(choices)[label].strip())}(?!\w)", text, re.IGNORECASE
        ):
            before, after = text[: match.start()], text[match.end() :]
            first = not re.search(r"\w", re.sub(r"(?i)^\W*(?:the|an?)\b", "", before))
            first = first and patterns.POINTS_FIRST.match(after) is not None
            last = patterns.POINTS_LAST.search(before) and not re.search(r"\w", after)
            if (
                first
                or last
                or (patterns.POINTS.search(before) and not patterns.IS_WRONG.match(after))
            ):
                found.add(label)
    if len(found) == 1:
        return found.pop()
    *_, part = patterns.SO.split(text)
    return _by_text(part, choices) if part != text and not found else None


def _by_words(text: str, choices: Choices) -> str | None:
    """The only choice all of whose words stand in a short text in order: "state her name"."""
    words = normalised_words(text)
    found = []
    for label, choice in choices:
        rest = iter(words)
        own = normalised_words(choice)
        signed = is_mathematical(choice) and not _signs_agree(text, choice)
        if own and not signed and len(words) <= 2 * len(own) and all(word in rest for word in own):
            found.append(label)
    return found[0] if len(found) == 1 and not patterns.EXCLUDES.search(text) else None


def _signs_agree(text: str, choice: str) -> bool:
    """Whether a text has a choice with no sign before it and nothing that goes on behind it."""
    own = r"\s*".join(re.escape(part) for part in choice.split())
    return re.search(rf"(?<![\w.√/^-]){own}(?!\w|[/^.]\w)", text) is not None


def _within(part: Sequence[str], words: Sequence[str]) -> bool:
    size = len(part)
    return bool(size) and any(words[i : i + size] == part for i in range(len(words) - size + 1))


def _denied(text: str, choice: str, choices: Choices) -> bool:
    """Whether a text denies a choice whose text it contains, alone or in a list of choices."""
    if patterns.EXCLUDES.search(choice):
        return False
    at = text.lower().find(choice.lower().strip())
    if at < 0:
        return _reaches(text)
    before, after = text[:at], text[at + len(choice) :]
    while listed := _after_list(before, choices):
        before = listed
    return _reaches(patterns.CLAUSE.split(before)[-1]) or patterns.IS_WRONG.match(after) is not None


def _after_list(text: str, choices: Choices) -> str | None:
    """A text without the choice and comma or "or" at its end; None if it does not end so."""
    joined = re.search(r"\s*(?:,|\bor\b|\band\b|\bnor\b)\s*(?:(?:or|and|nor|an?|the)\s+)*$", text)
    if joined is None:
        return None
    before = text[: joined.start()]
    own = [t for _, t in choices if t and before.lower().endswith(t.lower().strip())]
    return before[: -len(own[0].strip())] if own else None


def _reaches(before: str) -> bool:
    """Whether a denial in a text reaches its end, with no verb between: "is not a", "rules out"."""
    if patterns.DOUBTS.search(before):
        return True
    *_, last = [None, *patterns.EXCLUDES.finditer(before)]
    if last is not None and last[0].lower() in ("neither", "nor"):  # "neither are marble and slate"
        return True
    return last is not None and patterns.VERB.search(before, last.end()) is None


def _is_answer(sentence: str, choices: Choices) -> bool:
    """Whether a sentence begins with a bare label that answers: "So it is B", "B, I think"."""
    start = patterns.LEAD.match(sentence)
    label = patterns.BARE.match(sentence, start.end() if start else 0)
    return (
        label is not None
        and as_label(label[1], choices) is not None
        and patterns.ENDS_ANSWER.match(sentence, label.end()) is not None
    )


def _mentioned(sentence: str, choices: Choices) -> list[str]:
    """The labels that a sentence names and does not deny, in order and once each."""
    found: list[str] = []
    for clause in _clauses(sentence, choices):
        marks = [*patterns.BRACKETED.finditer(clause)] or [*patterns.OPTION.finditer(clause)]
        for match in marks:
            label = as_label(match[1], choices)
            if label is None or label in found:
                continue
            after = clause[after_own_text(clause, match.end(), dict(choices)[label]) :]
            if _reaches(clause[: match.start()]) or patterns.IS_WRONG.match(after):
                continue
            found.append(label)
    return found


def _clauses(sentence: str, choices: Choices) -> Iterator[str]:
    """The clauses of a sentence; a part that is only a label and its text belongs to the next."""
    kept, start = "", 0
    texts = {label: normalised_words(text) for label, text in choices}
    for match in [*patterns.CLAUSE.finditer(sentence), None]:
        part = sentence[start : match.start() if match else len(sentence)]
        start = match.start() if match else len(sentence)
        label = patterns.BRACKETED.search(part)
        own = texts.get(as_label(label[1], choices) or "", []) if label else None
        rest = normalised_words(part[label.end() :]) if label else []
        listed = label is not None and rest in ([], own) and match is not None and match[0] == ","
        kept += part
        if not listed:
            yield kept
            kept = ""


def _called_right(sentence: str, choices: Choices) -> str | None:
    """The choice that a sentence calls correct."""
    if together := patterns.ALL_RIGHT.search(sentence):
        return labels_throughout(re.sub("[、和及与]", ",", together[1]), choices)
    negates = patterns.NEGATES.search(sentence)
    parts = (
        re.split(r"[;,]|\bbut\b|\bwhile\b|\bas\b|\bsince\b", sentence) if negates else [sentence]
    )
    said = [
        next(filter(None, match.groups()))
        for part in parts
        if not patterns.NEGATES.search(part)
        for match in patterns.CALLED_RIGHT.finditer(part)
    ]
    labels = {label for label in (as_label(each, choices) for each in said) if label}
    return labels.pop() if len(labels) == 1 else None


def _as_a_whole(text: str, choices: Choices) -> str | None:
    """The answer of a text that is nothing but an answer: a label, "B. city", or a choice's text,
    perhaps with an explanation below. A text that starts to go through the choices does not count.
    """
    first, _, rest = text.partition("\n")
    plain = unwrapped(first).strip(patterns.ORNAMENTS)
    if not rest:
        plain = re.sub(r"^(?:Option|Choice)\s+(?=[(\[]?[A-Z][)\]]?\s*[.:,)])", "", plain)
    if patterns.ONLY_LABELS.fullmatch(plain) and not rest:
        return labels_at_start(plain, choices)
    head = patterns.BRACKETED.match(plain) or re.match(
        r"([A-Z0-9])\s*(?:[).:,]|(?=\()|-+\s+(?=[A-Za-z]{2})|$)", plain
    )
    label = as_label(head[1], choices) if head else None
    if head is not None and label is not None:
        others = re.match(r"\s*[(\[]?([A-Za-z0-9])[)\].:]", rest.lstrip())
        listed = others is not None and as_label(others[1], choices) not in (None, label)
        listed |= any(
            as_label(other, choices) not in (None, label)
            for other in patterns.BRACKETED.findall(plain)
        )
        short = len(sentences(plain[head.end() :])) <= 1
        denied = patterns.EXCLUDES.search(plain[head.end() :]) and not patterns.EXCLUDES.search(
            dict(choices)[label]
        )
        denied = denied or refuses_firmly(plain)
        if not listed and not denied and (short or not rest):
            return labels_at_start(plain, choices)
    lower = re.match(r"([a-z])(?:[).]?$|[).:]\s+(?P<own>.*))", plain)
    label = as_label(lower[1], choices) if lower else None
    if lower is not None and label is not None:
        own = normalised_words(dict(choices)[label])
        if not lower["own"] or normalised_words(lower["own"])[: len(own)] == own:
            return label
    below = [line for line in rest.split("\n") if any(_is_same(line, own) for _, own in choices)]
    alone = not rest.strip() or (rest.startswith("\n") and not below)
    exact = [label for label, own in choices if _is_same(first if alone else text, own)]
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


def _verdicts(text: str, choices: Choices) -> str | None:
    """The choice "Not wrong, Wrong" or "True, False" of a text that judges two things in turn."""
    pairs = {
        label: [_VERDICTS.get(" ".join(normalised_words(part))) for part in choice.split(",")]
        for label, choice in choices
    }
    if any(len(pair) != 2 or None in pair for pair in pairs.values()):
        return None
    said = _both_verdicts(text) or [
        verdict
        for part in patterns.TURNS.split(last_paragraph(text))
        if (verdict := _verdict(part)) is not None
    ]
    return next((label for label, pair in pairs.items() if pair == said), None)


def _both_verdicts(text: str) -> list[bool] | None:
    """The verdicts on the first and on the second of two things that a text names."""
    *_, together = [None, *patterns.BOTH.finditer(text)]
    said: dict[bool, bool] = {}
    before = ""
    marks = [*patterns.FIRST_OR_SECOND.finditer(text)]
    for mark, after in itertools.zip_longest(marks, marks[1:]):
        part = text[mark.end() : after.start() if after else len(text)]
        ends = re.search(r"(?<=[^:\s])\s*\n|[.;]\s", part)
        part = part[: ends.start()] if ends else part
        verdict, previous = _verdict(part), [*said.values()][-1:]
        if verdict is None and previous:
            if patterns.AS_WELL.search(text[: mark.start()]):
                verdict = previous[0]
            elif patterns.IS_NOT.match(part) or patterns.IS_TOO.match(part):
                denies = patterns.DENIES.search(part), patterns.DENIES.search(before)
                verdict = previous[0] == (bool(denies[0]) == bool(denies[1]))
        before = part
        if verdict is not None:
            said[mark["second"] is not None] = verdict
    if len(said) == 2:
        return [said[False], said[True]]
    verdict = _verdict(text[together.end() :]) if together and not said else None
    if together is None or verdict is None:
        return None
    return [verdict != (together[0].lower() == "neither")] * 2


def _verdict(text: str) -> bool | None:
    """The first verdict of a text: whether it calls something right."""
    match = patterns.VERDICT.search(text)
    return None if match is None else (match["right"] is not None) != (match["denied"] is not None)


def _judged(text: str, choices: Choices) -> str | None:
    """The only choice with a positive verdict where each choice has one: "A no, B yes, C no"."""
    found: dict[str, bool] = {}
    texts = dict(choices)
    for match in patterns.LABEL_FIRST.finditer(text):
        label = as_label(match[1], choices)
        if label is None:
            continue
        line = text[after_own_text(text, match.end(), texts[label]) :].partition("\n")[0]
        verdict = patterns.JUDGED.match(line) or (
            patterns.JUDGED_LAST.search(line) if match[0][:1] in "\n" or not match.start() else None
        )
        if verdict is not None:
            found[label] = verdict["yes"] is not None
    right = [label for label, is_right in found.items() if is_right]
    left = [label for label, _ in choices if label not in found]
    if not right and len(left) == 1 and labels_at_start(text, choices) == left[0]:
        return left[0]
    every = len(found) == len(choices) or (len(found) > 2 and [*found][-1:] == right)
    return right[0] if every and len(right) == 1 else None


def _concluded(sentence: str, choices: Choices, *, brief: bool) -> str | None:
    """The only choice that a concluding sentence names, by label, words or value; "" for several.

    Args:
      brief: the sentence is the whole text, so that it concludes without a word such as "so".
    """
    plain = unwrapped(sentence)
    alone = re.fullmatch(r"[(\[]?([A-Z0-9])[)\].:!]*", plain.strip(patterns.ORNAMENTS))
    if alone is not None:
        return as_label(alone[1], choices)
    *_, so = patterns.SO.split(plain)
    if so != plain and (found := _concluded(so, choices, brief=True)) is not None:
        return found
    if patterns.CONSIDERS.match(plain) or (so != plain and patterns.SO_NOT.fullmatch(so)):
        return None
    if instead := patterns.IS_INSTEAD.search(plain):
        return as_label(instead[1], choices)
    for part in (plain, re.sub(r"\s+(?:is|does|fits)\W*$", "", plain)):
        if (exact := _by_whole(part, choices)) is not None:
            return exact
    if refuses_firmly(plain):
        return _label_of_refusal(choices) or ""
    if brief and (ordinal := patterns.ORDINAL.search(plain)):
        return _at_place(ordinal[1], choices)
    if (found := _called_right(plain, choices)) is not None:
        return found
    if (
        brief
        and (subject := patterns.SUBJECT.match(plain) or patterns.CHOSEN.search(plain))
        and not patterns.EXCLUDES.search(plain)
    ):
        return as_label(subject[1], choices)
    plain = patterns.PASSED_OVER.sub("", plain)
    if leaves := patterns.LEAVES.search(plain) or patterns.INSTEAD.search(plain):
        plain = plain[leaves.end() :]
    if leaves or _is_answer(plain, choices):
        found = labels_at_start(plain, choices)
        if found is not None:
            return found or _preferred(plain, choices)
    labels = _mentioned(plain, choices)
    if labels:
        return labels[0] if len(labels) == 1 else ""
    if (ends := patterns.ENDS_IN_LABEL.search(plain)) and not _reaches(
        patterns.CLAUSE.split(plain[: ends.start()])[-1]
    ):
        return as_label(ends[1] or ends[2], choices)
    if patterns.BRACKETED.search(plain) or not (brief or patterns.CONCLUDES.search(plain)):
        return None
    if any(is_mathematical(text) for _, text in choices):
        if patterns.OR_VALUE.search(sentence):
            return ""
        value = concluded_value(sentence)
        end = sentence.rpartition("=")[2].strip(" .")
        for each in (end, unwrapped(end)):
            if (exact := _by_whole(each, choices)) is not None:
                return exact
            equal = [label for label, text in choices if same_value(each, text)]
            if len(equal) == 1:
                return equal[0]
        equal = [label for label, text in choices if value and same_value(value, text)]
        if len(equal) == 1:
            return equal[0]
    return _by_text(plain, choices)
