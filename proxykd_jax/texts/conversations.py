"""Turns from a file become rows: roles and texts are checked, one row per answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

from proxykd_jax.texts.records import Message, Role, RowProblem

# Zero-width characters, which Unicode does not count as white space.
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad")
NOTHING_LEARNT = "every answer is flagged as context only"


class RawTurn(NamedTuple):
    """A turn as found.

    Attributes:
      role: unchecked.
      content: of any type. A RowProblem says why a conversation that needs the turn is dropped.
      learnt: False for an answer that is context only.
      problem: why an answer is dropped although it may be context.
      unread: (key, example) of keys beside the answer that nobody reads, where they lie in a file
        of their own.
    """

    role: Any
    content: Any
    learnt: bool = True
    problem: str | None = None
    unread: tuple[tuple[str, str], ...] = ()


RawTurns = Sequence[RawTurn]


def _not_counted(reason: str) -> None:
    pass


def expand_turns(
    turns: RawTurns,
    *,
    keep: Literal["last", "each"],
    prompts_only: bool,
    left_out: Callable[[str], None] = _not_counted,
) -> Iterator[tuple[Message, ...]]:
    """The rows that one conversation gives.

    Args:
      turns: an optional system message, then user and assistant alternating. An empty system
        message is dropped. The content of a final assistant turn may be missing.
      keep: ``each`` gives one row per answer, with everything before it as the prompt; ``last``
        gives only the last answer. Answers that are context only give no row.
      prompts_only: rows end with the user instead; a final answer is dropped unread.
      left_out: called with the reason for each answer that is dropped.

    Raises:
      RowProblem: the conversation is malformed, with the reason. All of it is dropped, because
        answers next to damaged turns cannot be trusted.
    """
    if prompts_only and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    messages: list[Message] = []
    found: list[RawTurn] = []
    for turn in turns:
        message = _message(turn.role, turn.content, bool(messages))
        if message is None:
            continue
        last = messages[-1].role if messages else None
        if message.role == "assistant" and last != "user":
            raise RowProblem("two assistant turns in a row" if last == "assistant" else "no prompt")
        if message.role == "user" and last == "user":
            raise RowProblem("two user turns in a row")
        messages.append(message)
        found.append(turn)
    if not messages or messages[-1].role == "system":
        raise RowProblem("no prompt")
    end = "user" if prompts_only else "assistant"
    if messages[-1].role != end:
        raise RowProblem("prompt without answer" if end == "assistant" else "no prompt")
    ends = [
        place
        for place, turn in enumerate(found)
        if turn.role == end and (turn.learnt or prompts_only)
    ]
    if not ends:
        raise RowProblem(NOTHING_LEARNT)
    for place in ends if keep == "each" else ends[-1:]:
        problem = None if prompts_only else found[place].problem
        if problem is None:
            yield tuple(messages[: place + 1])
        else:
            left_out(problem)


def checked_text(content: Any, missing: str) -> str:
    """A non-blank text that UTF-8 can encode, unchanged.

    Raises:
      RowProblem: ``missing`` if it is null, absent or blank; otherwise if it is not text, or is
        damaged.
    """
    if content is None:
        raise RowProblem(missing)
    if not isinstance(content, str):
        raise RowProblem("content that is not text")
    if not content or content.isspace() or (content[0] in _INVISIBLE and _is_blank(content)):
        raise RowProblem(missing)
    if "\0" in content:
        raise RowProblem("NUL character in the text")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem("half of a surrogate pair in the text") from error
    return content


def _is_blank(text: str) -> bool:
    return all(character in _INVISIBLE or character.isspace() for character in text)


def _message(role: Any, content: Any, started: bool) -> Message | None:
    if isinstance(content, RowProblem):
        raise content
    if role == "system":
        if started:
            raise RowProblem("system message after the start")
        if content is None or (isinstance(content, str) and not content.strip()):
            return None
        return Message("system", checked_text(content, ""))
    if role not in ("user", "assistant"):
        raise RowProblem("unknown role")
    missing = "empty prompt" if role == "user" else "empty answer"
    return Message(cast(Role, role), checked_text(content, missing))
