"""Turns from a file become rows: roles and texts are checked, one row per answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

from proxykd_jax.texts.records import Message, Role, RowProblem

# (role, content) as found: the role is unchecked, the content may have any type.
RawTurns = Sequence[tuple[Any, Any]]
# Role of an assistant's turn that is context, not an answer to learn.
QUOTED = "assistant, quoted"


def expand_turns(
    turns: RawTurns, *, keep: Literal["last", "each"], prompts_only: bool
) -> Iterator[tuple[Message, ...]]:
    """The rows that one conversation gives.

    Args:
      turns: an optional system message, then user and assistant alternating. An empty system
        message is dropped. The content of a final assistant turn may be missing. A turn of
        ``QUOTED`` is the assistant's, and gives no row.
      keep: ``each`` gives one row per answer, with everything before it as the prompt; ``last``
        gives only the last answer.
      prompts_only: rows end with the user instead; a final answer is dropped unread.

    Raises:
      RowProblem: the conversation is malformed, with the reason. All of it is dropped, because
        answers next to damaged turns cannot be trusted.
    """
    if prompts_only and turns and turns[-1][0] in ("assistant", QUOTED):
        turns = turns[:-1]
    messages: list[Message] = []
    quoted = set()
    for role, content in turns:
        message = _message("assistant" if role == QUOTED else role, content, bool(messages))
        if message is None:
            continue
        if role == QUOTED:
            quoted.add(len(messages))
        last = messages[-1].role if messages else None
        if message.role == "assistant" and last != "user":
            raise RowProblem("two assistant turns in a row" if last == "assistant" else "no prompt")
        if message.role == "user" and last == "user":
            raise RowProblem("two user turns in a row")
        messages.append(message)
    if not messages or messages[-1].role == "system":
        raise RowProblem("no prompt")
    end = "user" if prompts_only else "assistant"
    if messages[-1].role != end:
        raise RowProblem("prompt without answer" if end == "assistant" else "no prompt")
    ends = [
        place + 1
        for place, message in enumerate(messages)
        if message.role == end and place not in quoted
    ]
    if not ends:
        raise RowProblem("no answer to learn")
    for place in ends if keep == "each" else ends[-1:]:
        yield tuple(messages[:place])


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
    if not content or content.isspace():
        raise RowProblem(missing)
    if "\0" in content:
        raise RowProblem("NUL character in the text")
    if not content.isascii():
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem("half of a surrogate pair in the text") from error
    return content


def _message(role: Any, content: Any, started: bool) -> Message | None:
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
