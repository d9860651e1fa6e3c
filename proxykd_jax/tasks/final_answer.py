r"""Finds the final statements of a model's text: the places where it says what its answer is.

The forms of a final statement, and where each may stand:

- box: ``\boxed{B}``, ``\fbox{B}``, ``[[B]]``; anywhere.
- field: ``<answer>B</answer>``, ``{"answer": "B"}``; anywhere.
- hashes: ``#### 18``; a line of its own, and with words after the number only the last line.
- stated: "the answer is B", "I would choose B", 故选B, "La respuesta es B"; anywhere.
- headed: "Answer: B", "Réponse : B", or a heading "Final answer" above the answer; short ones only.
- refusal: "the answer cannot be determined", "none of the options is right"; after the others.

The last final statement decides, even if it names no possible answer. ``decide`` applies that rule
for every kind of answer. ``closing_sentences`` returns the conclusion of a text without statements.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from proxykd_jax.tasks import statement_patterns as patterns


class Statement(NamedTuple):
    """A place where a text says what its answer is.

    Attributes:
      text: what it says, up to the end of the line.
      start: position in the text.
      form: "box", "field", "hashes", "stated", "headed" or "refusal".
      denied: it says what the answer is not; the text begins with "not".
    """

    text: str
    start: int
    form: str
    denied: bool = False

    @property
    def whole(self) -> bool:
        """Whether the text is nothing but an answer."""
        return self.form in ("box", "field")

    @property
    def first(self) -> str:
        """The part that may hold the answer: all of a box or field, otherwise one sentence."""
        return self.text if self.whole else (sentences(self.text) or [""])[0]

    @property
    def decides(self) -> bool:
        """Whether it is final even if it gives no possible answer."""
        if self.form in ("box", "field", "hashes", "refusal"):
            return True
        if refuses(self.first):
            return True
        if self.denied or not re.search(r"\w", self.first) or patterns.POINTER.match(self.first):
            return False
        return len(self.first.split()) <= patterns.MOST_WORDS[self.form]


def cleaned(output: str) -> str:
    """A model's text, prepared for the search.

    Full-width signs become ASCII. Hidden thoughts are removed; what follows the beginning of
    thoughts that do not end is no answer either. So are the questions that a base model goes on to
    ask itself after an answer.
    """
    text = _without_thoughts(output.translate(patterns.ASCII)).strip()
    text = patterns.HTML_BOLD.sub("**", patterns.HTML.sub("", text))
    if ended := patterns.END_OF_TURN.search(text, 1):
        text = text[: ended.start()].strip()
    ends = [match.end() for each in _MARKS for match in [each.search(text)] if match]
    following = (
        patterns.NEXT_QUESTION.search(text, min(ends))
        if ends
        else patterns.NEXT_QUESTION.search(text)
    )
    if following and (ends or len(text[: following.start()].split()) <= 8):
        return text[: following.start()].strip()
    return text


def _without_thoughts(text: str) -> str:
    begun = patterns.THOUGHT_BEGINS.search(text)
    *_, ended = [None, *patterns.THOUGHT_ENDS.finditer(text)]
    if ended is not None:
        before = text[: begun.start()] if begun and begun.start() < ended.start() else ""
        text = before + "\n" + text[ended.end() :]
        begun = patterns.THOUGHT_BEGINS.search(text)
    return text[: begun.start()] if begun else text


def decide(text: str, read: Callable[[Statement], str | None]) -> tuple[bool, str | None]:
    """(whether a final statement decides, the answer that it gives).

    Args:
      text: a text without emphasis.
      read: the answer in a statement; "" if it names several without deciding, None if none.
    """
    for statement in statements(text):
        found = read(statement)
        if found is not None:
            return True, found or None
        if statement.decides:
            return True, None
    return False, None


def statements(text: str) -> list[Statement]:
    """The final statements of a text, last first.

    What the text takes back ("no, that's wrong") is none. A refusal is one only after a statement
    in words: a box, a field and hashes stand, whatever doubts follow them.
    """
    found = [*_boxes(text), *_fields(text), *_hashed(text), *_said(text)]
    *_, taken_back = [None, *patterns.TAKES_BACK.finditer(text)]
    if taken_back is not None:
        found = [each for each in found if each.start > taken_back.start()]
    found.sort(key=lambda statement: -statement.start)
    found = found[: patterns.MOST_MARKS]
    if found and found[0].form in patterns.MOST_WORDS:
        first = found[0].first
        begin = max(found[0].start, text.find(first, found[0].start)) + len(first)
        *_, last = [None, *patterns.REFUSES.finditer(text, min(begin, len(text)))]
        if last is not None:
            rest = _rest_of_line(text, last.start())
            found.insert(0, Statement(rest, last.start(), "refusal"))
    return found


def boxed_contents(text: str) -> list[tuple[int, str]]:
    r"""(start, content) of each ``\boxed{content}``, braces matched; unclosed ones run on."""
    found = [(match.start(), match[1]) for match in patterns.BOXED_BARE.finditer(text)]
    for match in list(patterns.BOXED.finditer(text))[-patterns.MOST_MARKS :]:
        if text[match.start()] == "[":
            place = text.index("]]", match.end())
            found.append((match.start(), text[match.end() : place]))
            continue
        depth = 0
        for place in range(match.end(), len(text)):
            if text[place - 1] == "\\" and place > match.end():
                continue
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                break
        else:
            place = len(text)
        found.append((match.start(), text[match.end() + 1 : place]))
    return sorted(found)


def _boxes(text: str) -> Iterator[Statement]:
    for start, content in boxed_contents(text):
        if content.strip():
            yield Statement(content, start, "box")


def _fields(text: str) -> Iterator[Statement]:
    for match in patterns.FIELD.finditer(text):
        content = next(
            match[name] for name in ("tagged", "bracketed", "value") if match[name] is not None
        )
        if match["value"] is not None:
            content = content.strip("\"'").replace("\\\\", "\\").replace('\\"', '"')
            content = re.sub(r"^\[|\]$|[\"']", "", content) if content[:1] == "[" else content
        if not _is_prose(content.strip()):
            yield Statement(content.strip(), match.start(), "field")


def _hashed(text: str) -> Iterator[Statement]:
    matches = list(patterns.HASHED.finditer(text))
    for match in matches[-patterns.MOST_MARKS :]:
        said = match[1]
        if re.match(r"\d+[.):]\s+\S|\d+\s+-\s", said) or not re.match(
            r"[^A-Za-z\s]|[A-Za-z](?:\W|$)|(?i:yes|no|true|false|valid|invalid)\b", said
        ):
            continue
        rest = text[match.end() :].strip()
        # "#### 2024 sales" above a text is a heading.
        if re.search(r"[A-Za-z]{2}", said[2:]) and rest and not rest.startswith("####"):
            continue
        yield Statement(said, match.start(), "hashes")


def _said(text: str) -> Iterator[Statement]:
    """Statements in words, without those that are only assumed, asked or about something else."""
    for match in list(patterns.STATED.finditer(text))[-patterns.MOST_MARKS :]:
        rest = _rest_of_line(text, match.end())
        before = text[max(0, match.start() - 100) : match.start()]
        if (
            not rest
            or patterns.UNMEANT.search(before)
            or (sentences(rest) or [""])[0].endswith("?")
        ):
            continue
        denied = any(match[name] is not None for name in ("no", "nor", "nt", "not", "bu"))
        if denied and (instead := patterns.INSTEAD.search((sentences(rest) or [""])[0])):
            yield Statement(rest[instead.end() :].strip(), match.start(), "stated")
        else:
            yield Statement(f"not {rest}" if denied else rest, match.start(), "stated", denied)
    for match in list(patterns.HEADED.finditer(text))[-patterns.MOST_MARKS :]:
        rest = _rest_of_line(text, match.end())
        if rest and not _is_prose(rest):
            yield Statement(rest, match.start(), "headed")


_MARKS = (patterns.BOXED, patterns.STATED, patterns.HEADED, patterns.HASHED, patterns.FIELD)


def bold_spans(text: str) -> list[str]:
    """The bold spans of the last paragraph, last first, without titles ("Step 2", "Total:")."""
    paragraph = last_paragraph(text)
    found = []
    for match in patterns.BOLD.finditer(paragraph):
        line = paragraph[paragraph.rfind("\n", 0, match.start()) + 1 :]
        alone = re.match(r"\W*" + re.escape(match[0]) + r"\W*?\n", line) is not None
        title = alone and re.search(r"[A-Za-z]{2}", match[1]) is not None
        titled = match[2] or match[1].rstrip().endswith(":") or patterns.TITLE.match(match[1])
        if not title and not titled:
            found.append(match[1].strip())
    return found[::-1]


def last_paragraph(text: str) -> str:
    """The text after the last empty line."""
    return re.split(r"\n\s*\n", text.strip())[-1]


def sentences(text: str) -> list[str]:
    """The sentences of a text; the end of a line ends a sentence."""
    return [part.strip() for part in patterns.SENTENCE_END.split(text) if part and part.strip()]


def refuses_firmly(text: str) -> bool:
    """Whether a text says of the answer or the options that there is none or none is right."""
    return patterns.REFUSES.search(text) is not None


def closing_sentences(text: str) -> list[str]:
    """The sentences of the last paragraph, last first; none after a question or if it stops short.

    Offers of more help at the end are no part of the conclusion.
    """
    text = patterns.TAGS.sub("\n", text)
    while offer := patterns.OFFER.search(text):
        text = text[: offer.start()].rstrip()
    found = sentences(last_paragraph(text))[::-1]
    return [] if found and (found[0].endswith("?") or patterns.STOPS.search(text)) else found


def without_check(text: str) -> str:
    """A text without the check of its result and the notes at its end, if they do not conclude."""
    for pattern in (patterns.NOTES, patterns.CHECKS):
        for match in pattern.finditer(text):
            before, after = text[: match.start()].strip(), text[match.start() :]
            again = patterns.AGAIN.search(after) or any(mark.search(after) for mark in _MARKS)
            denies = pattern is patterns.CHECKS and re.search(r"\bnot\b|n't\b", after)
            if re.search(r"\w", before) and not again and not denies:
                text = before
                break
    return text


def corrected(text: str) -> str | None:
    """The part of a text that corrects what stands before it; None if none concludes anew."""
    *_, last = [None, *patterns.CORRECTS.finditer(text)]
    if last is None or not re.search(r"\w", text[: last.start()]):
        return None
    rest = text[last.end() :].lstrip(" ,.:-—")
    brief = len(rest.split()) <= patterns.MOST_WORDS_ANEW
    return rest if brief or patterns.CONCLUDES_ANEW.search(rest) else None


def refuses(text: str) -> bool:
    """Whether a text says that there is no answer, or gives none."""
    return refused(text) is not None


def refused(text: str) -> int | None:
    """The position at which a text says that there is no answer; None if it does not."""
    found = patterns.REFUSES_AT_ALL.search(text)
    return None if found is None else found.start()


def without_emphasis(text: str) -> str:
    """A text without Markdown's markers of bold and italic words."""
    text = text.replace("**", "").replace("__", "")
    return re.sub(r"(?<![A-Za-z0-9_])_([^_\n]+)_(?![A-Za-z0-9_])", r"\1", text)


def unwrapped(text: str) -> str:
    r"""A text without LaTeX's fonts and mathematics: "\text{(C) city}" becomes "(C) city"."""
    before, text = None, re.sub(r"\{\\(rm|bf|it|sf|tt)\s+", r"\\text{", text)
    while before != text:
        before, text = text, patterns.WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[(\[\])]|\\[ ,;!]|\\quad", " ", text)
    text = text.replace("$", " ").strip()
    braced = re.fullmatch(r"\{+([^{}]*)\}+", text)
    return braced[1].strip() if braced else text


def _rest_of_line(text: str, start: int) -> str:
    """The rest of the line, or the next non-empty line if the rest is empty."""
    for place, line in enumerate(text[start : start + patterns.LONGEST_REST].split("\n")):
        line = re.split(r"</[A-Za-z_]+>", line)[0]
        if re.search(r"[\w()\[\]{}<>]", line.replace("\\[", "").replace("\\(", "")):
            line = line.strip()
            return patterns.BULLET.sub("", line, 1) if place else line
    return ""


def _is_prose(rest: str) -> bool:
    """Whether the text after "Answer:" is an explanation of several sentences, not an answer."""
    parts = sentences(rest)
    return len(parts) > 1 and (
        len(parts[0].split()) > 6 or patterns.REASONS.match(parts[0]) is not None
    )
