"""Turns from a file become rows: roles and texts are checked, one row per answer or for all.

Calls, results and thoughts that stand in the texts are found here, whatever the format.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from proxykd_jax.texts.records import Message, RowProblem, TurnExtras
from proxykd_jax.texts.thoughts import split_thought
from proxykd_jax.texts.tool_texts import (
    CALL_TAG,
    TOOLS_TAG,
    calls_in_text,
    results_in_text,
    tools_in_text,
)

# Zero-width characters, which Unicode does not count as white space.
_INVISIBLE = frozenset("\u200b\u200c\u200d\u2060\ufeff\u00ad")
NOTHING_LEARNT = "every answer is flagged as context only"
THOUGHT_ALONE = "a thought without an answer"
CUT_THOUGHT = "an answer that was cut off in its thought (<think> without </think>)"
NO_CALL = "a tool's result without a call"
NO_ANSWER = "a tool's result without an answer"
TOOLS_SAID = "what the system text says about its tools gives way to the template's own words"
# The role of the turn that holds a conversation's tools; it stands before all others.
TOOLS = "tools"


class RawTurn(NamedTuple):
    """A turn as found.

    Attributes:
      role: unchecked; ``TOOLS`` for the conversation's tools, whose content is JSON text.
      content: of any type. A RowProblem says why a conversation that needs the turn is dropped.
      learnt: False for an answer that is context only.
      problem: why an answer is dropped although it may be context.
      unread: (key, example) of keys beside the answer that nobody reads, where they lie in a file
        of their own.
      thought: what stands beside an answer as its thought.
      calls: an assistant's calls as JSON text.
      name, call_id: of a tool's result.
    """

    role: Any
    content: Any
    learnt: bool = True
    problem: str | None = None
    unread: tuple[tuple[str, str], ...] = ()
    thought: str | None = None
    calls: str | None = None
    name: str | None = None
    call_id: str | None = None


RawTurns = Sequence[RawTurn]


class Conversation(NamedTuple):
    """The turns of one row, and the tools that may be called in it as JSON text."""

    messages: tuple[Message, ...]
    tools: str | None = None


def _not_counted(reason: str) -> None:
    pass


def expand_turns(
    turns: RawTurns,
    *,
    keep: Literal["last", "each", "all"],
    prompts_only: bool,
    left_out: Callable[[str], None] = _not_counted,
    noted: Callable[[str], None] = _not_counted,
) -> Iterator[Conversation]:
    """The rows that one conversation gives.

    Args:
      turns: perhaps the tools and a system message, then user and assistant alternating; results
        of tools stand behind the assistant's turn that calls them. An empty system message is
        dropped. The content of a final assistant turn may be missing.
      keep: ``each`` gives one row per answer, with everything before it as the prompt; ``last``
        gives only the last answer; ``all`` gives one row up to the last answer, in which the turns
        that are no answers to learn are not ``learnt``. A call is an answer too. Answers that are
        context only give no row.
      prompts_only: rows end before the assistant's turn instead; a final answer is dropped unread.
      left_out: called with the reason for each answer that is dropped.
      noted: called with what a reader should know.

    Raises:
      RowProblem: the conversation is malformed, with the reason. All of it is dropped, because
        answers next to damaged turns cannot be trusted.
    """
    if prompts_only and turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    tools = None
    if turns and turns[0].role == TOOLS:
        tools, turns = turns[0].content, turns[1:]
    messages: list[Message] = []
    found: list[RawTurn] = []
    waiting: list[dict[str, Any]] = []  # calls without a result
    called = 0
    last: Any = None
    for place, turn in enumerate(turns):
        role = turn.role
        if called and role == "user" and isinstance(turn.content, str):
            role = "user" if results_in_text(turn.content) is None else "tool"
        if role == "tool":
            if not messages or messages[-1].role not in ("assistant", "tool"):
                raise RowProblem(NO_CALL)
            results = _results(turn, waiting)
            if results and called == 0:
                raise RowProblem(NO_CALL)
            messages += results
            found += [turn] * len(results)
            last = "tool"
            continue
        if role == "system" and isinstance(turn.content, str) and TOOLS_TAG in turn.content:
            described = tools_in_text(turn.content)
            if described is not None:
                turn = turn._replace(content=described[0])
                tools = tools or described[1]
                noted(TOOLS_SAID)
        message = _message(turn, last, tools is not None, place == len(turns) - 1)
        if message is None:
            continue
        if role == "system" and messages:  # a developer's message behind the system's
            messages[0] = Message("system", f"{messages[0].content}\n\n{message.content}")
            continue
        if role == "user":
            if last in ("user", "tool"):
                turns_in_a_row = "two user turns in a row"
                raise RowProblem(turns_in_a_row if last == "user" else NO_ANSWER)
            messages.append(message)
            found.append(turn)
            last = role
            continue
        has_calls = message.calls is not None
        if has_calls:
            message, waiting = _with_ids(message, called)
            called += len(waiting)
        if role == "assistant" and last == "assistant":
            if not has_calls or (messages[-1].calls is not None and message.content):
                raise RowProblem("two assistant turns in a row")
            messages[-1] = _joined(messages[-1], message)
            waiting = json.loads(messages[-1].calls or "[]")
            problem = found[-1].problem or turn.problem
            found[-1] = turn._replace(learnt=turn.learnt and found[-1].learnt, problem=problem)
            continue
        if role == "assistant" and last not in ("user", "tool"):
            raise RowProblem("no prompt")
        if "think>" in message.content and message.extras is None and _is_cut(message):
            turn = turn._replace(problem=turn.problem or CUT_THOUGHT)
        messages.append(message)
        found.append(turn)
        last = role
    if not prompts_only:
        while messages and messages[-1].role == "tool":
            messages.pop()
            found.pop()
    if not messages or messages[-1].role == "system":
        raise RowProblem("no prompt")
    if prompts_only:
        if messages[-1].role not in ("user", "tool"):
            raise RowProblem("no prompt")
        following = [*(message.role for message in messages[1:]), "assistant"]
        ends = [place for place, role in enumerate(following) if role == "assistant"]
    else:
        if messages[-1].role != "assistant":
            raise RowProblem("prompt without answer")
        ends = [
            place
            for place, turn in enumerate(found)
            if messages[place].role == "assistant" and turn.learnt
        ]
    if not ends:
        raise RowProblem(NOTHING_LEARNT)
    whole = [end for end in ends if prompts_only or found[end].problem is None]
    if keep == "all" and not prompts_only:
        for end in ends:
            if end not in whole:
                left_out(found[end].problem or "")
        if whole:
            learnt = set(whole)
            yield Conversation(
                tuple(
                    message
                    if message.role != "assistant" or place in learnt
                    else dataclasses.replace(message, learnt=False)
                    for place, message in enumerate(messages[: whole[-1] + 1])
                ),
                tools,
            )
        return
    for place in ends if keep == "each" else ends[-1:]:
        problem = None if prompts_only else found[place].problem
        if problem is None:
            yield Conversation(tuple(messages[: place + 1]), tools)
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


def _message(turn: RawTurn, last: str | None, has_tools: bool, is_last: bool) -> Message | None:
    role, content = turn.role, turn.content
    if isinstance(content, RowProblem):
        raise content
    if role == "system":
        if last not in (None, "system"):
            raise RowProblem("system message after the start")
        if content is None or (isinstance(content, str) and not content.strip()):
            return None
        return Message("system", checked_text(content, ""))
    if role not in ("user", "assistant"):
        raise RowProblem("unknown role")
    if role == "user":
        return Message("user", checked_text(content, "empty prompt"))
    if turn.thought is None and turn.calls is None:
        content = checked_text(content, "empty answer")
        if "think>" not in content and CALL_TAG not in content:
            return Message("assistant", content)
    return _rich_answer(turn, has_tools or turn.calls is not None, is_last)


def _rich_answer(turn: RawTurn, has_tools: bool, is_last: bool) -> Message:
    """An assistant's turn with a thought or calls, beside its text or in it."""
    content = "" if turn.content is None else turn.content
    if not isinstance(content, str):
        raise RowProblem("content that is not text")
    thought, spelled, calls = turn.thought, None, turn.calls
    inner = split_thought(content)
    if inner is not None:
        if inner.answer is None:
            if not is_last:
                raise RowProblem(CUT_THOUGHT)
            return Message("assistant", checked_text(content, "empty answer"))
        if thought is None:
            thought, spelled = inner.thought, content
        elif inner.thought and inner.thought not in thought:
            thought = f"{thought.strip()}\n\n{inner.thought}"
        content = inner.answer
    if CALL_TAG in content:
        found = calls_in_text(content, expected=has_tools)
        if found is not None:
            content, spelled = found[0], None
            calls = _all_calls(calls, found[1])
    if thought is not None and spelled is None:
        thought = checked_text(thought, "empty answer").strip() if thought.strip() else None
    if calls is None or (content and not _is_blank(content)):
        content = checked_text(content, THOUGHT_ALONE if thought else "empty answer")
    else:
        content = ""
    if thought is None and calls is None:
        return Message("assistant", content)
    return Message("assistant", content, TurnExtras(thought, spelled, calls))


def _is_cut(message: Message) -> bool:
    """Whether an answer ends within its thought."""
    inner = split_thought(message.content) if message.role == "assistant" else None
    return inner is not None and inner.answer is None


def _all_calls(calls: str | None, more: str | None) -> str | None:
    if calls is None or more is None:
        return calls or more
    return json.dumps(json.loads(calls) + json.loads(more), ensure_ascii=False)


def _with_ids(message: Message, called: int) -> tuple[Message, list[dict[str, Any]]]:
    """A turn whose calls have ids, and its calls."""
    extras = message.extras
    assert extras is not None and extras.calls is not None
    calls = json.loads(extras.calls)
    for number, call in enumerate(calls, called):
        call.setdefault("id", made_id(number))
    extras = dataclasses.replace(extras, calls=json.dumps(calls, ensure_ascii=False))
    return dataclasses.replace(message, extras=extras), calls


def made_id(number: int) -> str:
    """The id of a call that has none; nine letters and digits, as Mistral's templates demand."""
    return f"call{number:05d}"


def _joined(first: Message, second: Message) -> Message:
    """A text and the calls behind it, or calls one after another, as one turn."""
    one, two = first.extras or TurnExtras(), second.extras or TurnExtras()
    thoughts = [thought for thought in (one.thought, two.thought) if thought]
    extras = TurnExtras("\n\n".join(thoughts) or None, None, calls=_all_calls(one.calls, two.calls))
    content = "\n\n".join(text for text in (first.content, second.content) if text)
    return Message("assistant", content, extras)


def _results(turn: RawTurn, waiting: list[dict[str, Any]]) -> list[Message]:
    """The results in a turn, each with the name and the id of the call that it answers."""
    content = "" if turn.content is None else turn.content
    if isinstance(content, RowProblem):
        raise content
    if not isinstance(content, str):
        raise RowProblem("content that is not text")
    found = []
    for text in results_in_text(content) or [content]:
        text = checked_text(text, "") if text.strip() else ""
        places = [n for n, call in enumerate(waiting) if call["id"] == turn.call_id]
        call = waiting.pop(places[0] if places else 0) if waiting else None
        function = call["function"]["name"] if call is not None else None
        identity = turn.call_id or (call["id"] if call is not None else None)
        name = turn.name or function
        found.append(Message("tool", text, TurnExtras(name=name, call_id=identity)))
    return found
