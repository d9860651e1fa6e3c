"""Thoughts: what a reasoning model writes before its answer, between ``<think>`` and ``</think>``.

A thought is found at the beginning of a text alone. Elsewhere the tags are letters, as in an answer
that explains them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

OPENING, CLOSING = "<think>", "</think>"
_BETWEEN = "\n\n"
# Where a generation prompt opens the thought, a text begins within it. The tag is then on a line of
# its own; in a sentence about the tag it is not.
_CLOSES_A_LINE = re.compile(r"(?:^|\n)[ \t]*</think>|</think>[ \t]*(?:\n|$)")
_OPENED, _CLOSED = re.compile(r"\s*<think>\s*"), re.compile(r"\s*</think>\s*")
_PAIR = re.compile(r"<think>.*?</think>\s*", re.DOTALL)


class Thinking(NamedTuple):
    """A text with a thought.

    Attributes:
      thought: without tags and the white space around it; may be empty.
      answer: the text behind it; None if the thought does not end.
    """

    thought: str
    answer: str | None


def split_thought(text: str) -> Thinking | None:
    """A text's thought and answer; None if it begins with no thought."""
    begun = text.lstrip()
    if begun.startswith(OPENING):
        thought, closed, answer = begun[len(OPENING) :].partition(CLOSING)
    else:
        found = None if OPENING in text else _CLOSES_A_LINE.search(text)
        if found is None:
            return None
        thought, closed, answer = text.partition(CLOSING)
    return Thinking(thought.strip(), answer.lstrip() if closed else None)


def without_thoughts(text: str) -> str:
    """An answer without the thoughts that it repeats further on."""
    return _PAIR.sub("", text) if OPENING in text else text


def spelled_out(thought: str | None, answer: str, *, opened: bool = False) -> str:
    """A thought and an answer as one text.

    Args:
      thought: without tags; None for none.
      answer: what follows.
      opened: the opening tag and a line break stand before the text.
    """
    if thought is None:
        return answer
    inside = f"{thought}\n" if thought else "\n"
    return f"{'' if opened else OPENING + chr(10)}{inside}{CLOSING}{_BETWEEN}{answer}"


def answer_start(text: str, begin: int, thought: str, answer: str, called: str = "") -> int | None:
    """Where the answer begins in a rendered text, behind its thought; None if neither is there.

    Args:
      text: the rendered conversation.
      begin: where the turn begins in it.
      thought, answer: as they were given to the template.
      called: the function that is called behind the thought if there is no answer.
    """
    opened = _OPENED.match(text, begin)
    place = text.find(thought.strip(), begin if opened is None else opened.end())
    if place < 0:
        return None
    place += len(thought.strip())
    closed = _CLOSED.match(text, place)
    place = place if closed is None else closed.end()
    if not answer.strip():
        return place if place <= text.find(called, begin) else None
    found = text.find(answer.strip(), place)
    return None if found < 0 else found
