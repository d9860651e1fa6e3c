"""Formats of corpora: recognises a row's format and turns the row into conversations.

A format has three parts: the keys that it reads, a test whether a row has them, and a function from
a row to conversations. Keys that any row may have beside them (a system text, flags, the reason why
an answer ended) are in ``row_keys.py``. The formats of benchmarks are in ``benchmark_files.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.conversations import TOOLS as TOOLS_TURN
from proxykd_jax.texts.conversations import RawTurn
from proxykd_jax.texts.records import RowProblem
from proxykd_jax.texts.row_keys import (
    CALL_ID,
    CALLS,
    COMMON,
    CONTEXT,
    HISTORY,
    NO_CALL_THERE,
    REASONING,
    SYSTEM,
    THOUGHTS,
    TOOL_CALLS,
    TOOLS,
    finish_problem,
    holds_text,
    is_context_only,
    is_tool_role,
    row_problem,
    says_any,
    thought_of,
    thought_text,
    unread_keys,
    unread_turn_keys,
)
from proxykd_jax.texts.tool_texts import calls_in_text, calls_json, tools_json

Record = Mapping[str, Any]
NOT_TEXT = "content that is not text"
NO_TURNS = "earlier turns that are neither pairs nor turns"


class Format(NamedTuple):
    """How rows of one format are read.

    Attributes:
      keys: the keys that a row needs, in words.
      fits: whether a row has them.
      conversations: the conversations of a row; with ``prompts_only`` the answer may be missing.
        Raises RowProblem for an unusable row.
      reads: the keys that it reads, and those that only repeat what it reads.
      first_of: spellings of one thing, of which it reads the first that is there.
    """

    keys: str
    fits: Callable[[Record], bool]
    conversations: Callable[[Record, SourceConfig, bool], list[list[RawTurn]]]
    reads: frozenset[str]
    first_of: tuple[tuple[str, ...], ...] = ()


_ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
    "developer": "system",
}
# Turns whose whole text is the call.
_CALL_ROLES = frozenset(("function_call", "tool_call", "tool_calls"))
_THOUGHT_PARTS = frozenset(("thinking", "reasoning", "redacted_thinking", "thought"))
_CALL_PARTS = frozenset(("tool_use", "tool_call", "function_call"))
_RESULT_PARTS = frozenset(("tool_result", "function_response", "function_call_output"))
_BESIDE_AN_ANSWER = frozenset((*CALLS, *THOUGHTS))
_TEXT_PARTS = frozenset(("text", "input_text", "output_text"))
_CONVERSATIONS = ("conversations", "conversation")
_CHATS = ("messages", *_CONVERSATIONS)
_TURN_LISTS = frozenset((*_CHATS, *HISTORY))
_SAYS_WHO = ("role", "from")
_ANSWERS = ("response", "completion", "chosen", "answer", "output")
_ALPACA_ANSWERS = ("output", "response", "completion", "chosen", "answer")
# Of a pair as an object.
_ASKED = ("user", "human", "prompt", "question", "instruction", "query")
_ANSWERED = ("assistant", "gpt", "response", "answer", "output", "completion", "model", "bot")
_NECTAR_TURN = re.compile(r"\n\n(Human|Assistant):")


def conversations_of(
    name: str, row: Record, source: SourceConfig, prompts_only: bool
) -> list[list[RawTurn]]:
    """The conversations of a row, with what the keys beside its texts say.

    Args:
      name: the format, which is not ``text``.
      row: a row that fits it.
      source: its source.
      prompts_only: the answer may be missing, and what is said about it does not count.

    Raises:
      RowProblem: the row cannot be used, or must not be learnt.
    """
    problem = row_problem(row, prompts_only=prompts_only, reads_tools=True, reads_thoughts=True)
    if problem is not None and problem != NO_CALL_THERE:
        raise RowProblem(problem)
    found = [
        _with_answer(row, _with_beginning(row, turns), prompts_only)
        for turns in FORMATS[name].conversations(row, source, prompts_only)
    ]
    if problem is not None and not all(turns and turns[-1].calls for turns in found):
        raise RowProblem(problem)
    return found


def check_row(row: Record, prompts_only: bool) -> None:
    """Checks the keys beside a plain text.

    Raises:
      RowProblem: they say that the row must not be learnt, or that it cannot be understood.
    """
    problem = row_problem(row, prompts_only=prompts_only)
    if problem is not None:
        raise RowProblem(problem)


def unread(name: str, row: Record) -> Iterator[tuple[str, str]]:
    """(key, example) of the keys of a row that hold text and are not read."""
    entry = FORMATS[name]
    yield from unread_keys(row, _KNOWN[name], entry.first_of)
    for key, value in row.items():
        if isinstance(value, list) and (key in _TURN_LISTS or key in entry.reads):
            for inner, example in unread_turn_keys(value):
                yield f"{key}[].{inner}", example


# --- turns ----------------------------------------------------------------------------------------


def _as_list(value: Any) -> list[Any] | None:
    """A list of objects; some libraries store it as an object of lists, or as JSON in a text."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [
                dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)
            ]
    return value if isinstance(value, list) else None


def _first_of(row: Record, keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


class _Parts(NamedTuple):
    """What a turn's content holds; ``results`` are pairs of a call's id and a text."""

    text: Any
    thought: str | None = None
    calls: tuple[Any, ...] = ()
    results: tuple[tuple[str | None, Any], ...] = ()


def _parts(content: Any) -> _Parts:
    """Takes a list of parts apart, of OpenAI's or Anthropic's forms."""
    parts = None if content is None or isinstance(content, str) else _as_list(content)
    if not parts:
        return _Parts(content)
    if not all(isinstance(part, Mapping) for part in parts):
        raise RowProblem(NOT_TEXT)
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Any] = []
    results: list[tuple[str | None, Any]] = []
    for part in parts:
        kind, text = part.get("type"), part.get("text")
        if kind in _TEXT_PARTS and isinstance(text, str):
            texts.append(text)
        elif kind in _THOUGHT_PARTS:
            thoughts.append(thought_text([part]))
        elif kind in _CALL_PARTS:
            calls.append(part)
        elif kind in _RESULT_PARTS:
            given = part.get("content") if "content" in part else part.get("output")
            results.append((part.get("tool_use_id") or part.get(CALL_ID), given))
        else:
            raise RowProblem(NOT_TEXT)
    thought = "\n\n".join(text for text in thoughts if text) or None
    return _Parts("".join(texts), thought, tuple(calls), tuple(results))


def _content(content: Any) -> Any:
    """The text of a turn that is a text alone."""
    if content is None or isinstance(content, str):
        return content
    found = _parts(content)
    if found.calls or found.results:
        return RowProblem(TOOL_CALLS)
    return found.text if found.thought is None else RowProblem(REASONING)


def _result_text(content: Any) -> str:
    """A tool's result as text: a text, parts of text, or any other value as JSON."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = _as_list(content)
    if parts and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in parts):
        return "".join(part["text"] for part in parts)
    return json.dumps(content, ensure_ascii=False, default=str)


def _turn(turn: Any) -> RawTurn:
    if not isinstance(turn, Mapping):
        raise RowProblem(NOT_TEXT)
    given = turn["role"] if "role" in turn else turn.get("from")
    content = turn["content"] if "content" in turn else turn.get("value")
    role = _ROLES.get(given) if isinstance(given, str) else None
    calls = None
    if role is None and isinstance(given, str):
        known = given.strip().lower()
        role = _ROLES.get(known)
        if role is None and is_tool_role(known):
            name, call_id = turn.get("name"), turn.get(CALL_ID)
            return RawTurn(
                "tool",
                _result_text(content),
                name=name if isinstance(name, str) and name else None,
                call_id=call_id if isinstance(call_id, str) and call_id else None,
            )
        if known in _CALL_ROLES:
            role, content, calls = "assistant", None, _call_text(content)
    if role != "assistant":
        return RawTurn(role, _content(content))
    if len(turn) == 2 and (content is None or isinstance(content, str)):
        return RawTurn(role, content, calls=calls)
    parts = _parts(content)
    if parts.results:
        raise RowProblem(TOOL_CALLS)
    return RawTurn(
        role,
        parts.text,
        not is_context_only(turn),
        _turn_finish(turn, calls),
        thought=parts.thought or thought_of(turn),
        calls=calls or _calls_of(turn, parts.calls),
    )


def _turn_finish(turn: Record, calls: str | None) -> str | None:
    problem = finish_problem(turn)
    has_call = calls is not None or says_any(turn, CALLS) is not None
    return None if problem == NO_CALL_THERE and has_call else problem


def _calls_of(turn: Record, parts: tuple[Any, ...] = ()) -> str | None:
    """The calls in a turn's keys and parts, as JSON text."""
    given = says_any(turn, CALLS)
    return calls_json(list(parts) or given) if parts or given is not None else None


def _call_text(content: Any) -> str | None:
    """The calls of a turn whose whole text they are."""
    if isinstance(content, str):
        tagged = calls_in_text(content, expected=True)
        if tagged is not None:
            return tagged[1]
    return calls_json(content)


def _chat(value: Any) -> list[RawTurn]:
    turns = _as_list(value)
    if not turns:
        raise RowProblem("no prompt")
    found: list[RawTurn] = []
    for turn in turns:
        if type(turn) is dict and type(turn.get("content")) is list:
            parts = _parts(turn["content"]) if turn.get("role") == "user" else None
            if parts is not None and parts.results:
                found += [
                    RawTurn("tool", _result_text(text), call_id=call_id)
                    for call_id, text in parts.results
                ]
                if not (isinstance(parts.text, str) and parts.text.strip()):
                    continue
                turn = {**turn, "content": parts.text}
        found.append(_turn(turn))
    return found


def _is_chat(value: Any) -> bool:
    turns = _as_list(value)
    if turns is None:
        return False
    return not turns or (
        isinstance(turns[0], Mapping) and not turns[0].keys().isdisjoint(_SAYS_WHO)
    )


# --- what stands before a row's own turns ---------------------------------------------------------


def _with_beginning(row: Record, turns: list[RawTurn]) -> list[RawTurn]:
    """Puts the row's system text and history first, and its end reason to its last answer."""
    start = 1 if turns and turns[0].role == "system" else 0
    history = _history(row)
    if history and turns[start : start + len(history)] != history:
        turns[start:start] = history
    system = next((row[key] for key in SYSTEM if holds_text(row.get(key))), None)
    if system is not None:
        system = _content(system)
        own = turns[0].content if start else None
        if isinstance(own, str) and own.strip() and own != system:
            # Both are said; the row's own text comes first.
            system = f"{system}\n\n{own}" if isinstance(system, str) else system
        turns[:start] = [RawTurn("system", system)]
    given = says_any(row, TOOLS)
    if given is None:
        given = _tools_of_first_turn(row)
    tools = tools_json(given) if given is not None else None
    return turns if tools is None else [RawTurn(TOOLS_TURN, tools), *turns]


def _tools_of_first_turn(row: Record) -> Any:
    """Tools beside the first turn, which is the system message; None for none."""
    for key in _CHATS:
        turns = row.get(key)
        first = turns[0] if isinstance(turns, list) and turns else None
        if first is not None and len(first) > 2 and isinstance(first, Mapping):
            return says_any(first, TOOLS)
    return None


def _with_answer(row: Record, turns: list[RawTurn], prompts_only: bool) -> list[RawTurn]:
    """Adds the calls and the thought beside a row's texts to its last answer."""
    beside = not _BESIDE_AN_ANSWER.isdisjoint(row)
    if beside and not prompts_only and turns and turns[-1].role == "assistant":
        last, calls, thought = turns[-1], _calls_of(row), thought_of(row)
        turns[-1] = last._replace(calls=last.calls or calls, thought=last.thought or thought)
    return turns


def _history(row: Record) -> list[RawTurn]:
    """The turns before the prompt: pairs of texts, turns, or pairs as objects."""
    given = _first_of(row, HISTORY)
    if given is None or not holds_text(given):
        return []
    turns = _as_list(given)
    if turns is None:
        raise RowProblem(NO_TURNS)
    found: list[RawTurn] = []
    if all(isinstance(turn, str) for turn in turns) and len(turns) % 2 == 0:
        turns = list(zip(turns[::2], turns[1::2], strict=True))
    for turn in turns:
        if isinstance(turn, Mapping) and not turn.keys().isdisjoint(_SAYS_WHO):
            found.append(_turn(turn))
            continue
        if isinstance(turn, Mapping):
            turn = (_first_of(turn, _ASKED), _first_of(turn, _ANSWERED))
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RowProblem(NO_TURNS)
        found += [RawTurn("user", turn[0]), RawTurn("assistant", turn[1])]
    return found


def _with_context(prompt: Any, row: Record, keys: tuple[str, ...] = CONTEXT) -> Any:
    """A prompt followed by the texts that it is about, unless it quotes them itself."""
    for key in keys:
        given = row.get(key)
        if isinstance(given, list) and all(isinstance(text, str) for text in given):
            given = "\n\n".join(given)
        if given is None or (isinstance(given, str) and not given.strip()):
            continue
        if not isinstance(given, str):
            raise RowProblem(NOT_TEXT)
        if isinstance(prompt, str) and given.strip() not in prompt:
            prompt = f"{prompt}\n\n{given}"
    return prompt


# --- formats --------------------------------------------------------------------------------------


def _messages(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    if "messages" in row:
        return [_chat(row["messages"])]
    given = row["input"]
    given = given["messages"] if isinstance(given, Mapping) and "messages" in given else given
    turns = _chat(given)
    if row.get("preferred_output"):
        turns += _chat(row["preferred_output"])
    return [turns]


def _fits_messages(row: Record) -> bool:
    if "messages" in row:
        return row["messages"] is None or _is_chat(row["messages"])
    given = row.get("input")
    given = given.get("messages", given) if isinstance(given, Mapping) else given
    return "preferred_output" in row and _is_chat(given)


def _prompt_response(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    prompt, answer = row.get("prompt"), _first_of(row, _ANSWERS)
    if isinstance(answer, Mapping) and "role" in answer:
        answer = [answer]
    said = _chat(answer) if isinstance(answer, list) and _is_chat(answer) else None
    if said is not None and said[0].role != "assistant":
        return [said]  # a preferred conversation, with its prompt
    if isinstance(prompt, list | Mapping):
        turns = _chat(prompt)
        if turns[-1].role == "user":
            turns[-1] = turns[-1]._replace(content=_with_context(turns[-1].content, row))
    else:
        turns = [RawTurn("user", _with_context(prompt, row))]
    if not prompts_only:
        turns += [RawTurn("assistant", _content(answer))] if said is None else said
    return [turns]


def _fits_prompt_response(row: Record) -> bool:
    prompt = row.get("prompt")
    if "prompt" in row:
        return prompt is None or isinstance(prompt, str) or _is_chat(prompt)
    return "rejected" in row and isinstance(row.get("chosen"), list) and _is_chat(row["chosen"])


def _alpaca(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    instruction = _with_context(row.get("instruction"), row)
    return [[RawTurn("user", instruction), RawTurn("assistant", _first_of(row, _ALPACA_ANSWERS))]]


def _sharegpt(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    return [_chat(_first_of(row, _CONVERSATIONS))]


def _openorca(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    question = _with_context(row.get("question"), row)
    return [[RawTurn("user", question), RawTurn("assistant", row.get("response"))]]


def _nectar(row: Record, source: SourceConfig, prompts_only: bool) -> list[list[RawTurn]]:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise RowProblem("empty prompt" if prompt is None else NOT_TEXT)
    head, *parts = _NECTAR_TURN.split(f"\n\n{prompt.lstrip()}")
    if head.strip() or not parts:
        raise RowProblem("Nectar prompt that does not begin with 'Human:'")
    turns = [
        RawTurn("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1] == RawTurn("assistant", ""):
        turns.pop()
    if prompts_only:
        return [turns]
    # Selected by model name, not by rank: the teacher is rarely ranked first.
    answers = [
        RawTurn("assistant", answer.get("answer"), problem=finish_problem(answer))
        for answer in _as_list(row.get("answers")) or []
        if isinstance(answer, Mapping) and str(answer.get("model")).startswith(source.teacher)
    ]
    if not answers:
        raise RowProblem("no answer of the teacher")
    return [[*turns, answer] for answer in answers]


def _fits_nectar(row: Record) -> bool:
    answers = _as_list(row.get("answers"))
    return (
        "prompt" in row
        and answers is not None
        and all(
            isinstance(answer, Mapping) and "answer" in answer and "model" in answer
            for answer in answers[:1]
        )
    )


def _no_conversations(row: Record, source: SourceConfig, prompts_only: bool) -> list[Any]:
    raise AssertionError("plain texts are rows themselves")


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


# The same conversation in other forms, and what was not chosen of a pair.
_REPEATED = ("prompt", "chosen", "rejected", "non_preferred_output")
_BEGINNING = (SYSTEM, HISTORY)

# With format auto they are tried in this order, the most specific first.
FORMATS: dict[str, Format] = {
    "nectar": Format(
        "prompt, answers [{answer, model}]",
        _fits_nectar,
        _nectar,
        _keys("prompt", "answers", "num_responses", "good_natured"),
        _BEGINNING,
    ),
    "openorca": Format(
        "system_prompt, question, response",
        lambda row: "question" in row and "system_prompt" in row,
        _openorca,
        _keys("question", "response", *CONTEXT),
        _BEGINNING,
    ),
    "messages": Format(
        "messages [{role, content}], or input and preferred_output",
        _fits_messages,
        _messages,
        _keys("preferred_output", *_REPEATED),
        (*_BEGINNING, ("messages", "input")),
    ),
    "sharegpt": Format(
        "conversations [{from, value}]",
        lambda row: _is_chat(_first_of(row, _CONVERSATIONS)),
        _sharegpt,
        _keys(*_REPEATED),
        (*_BEGINNING, _CONVERSATIONS),
    ),
    "alpaca": Format(
        "instruction and output or response, perhaps input",
        lambda row: "instruction" in row,
        _alpaca,
        _keys("instruction", "text", *CONTEXT),
        (*_BEGINNING, _ALPACA_ANSWERS),
    ),
    "prompt_response": Format(
        "prompt and response or completion, or prompt and chosen",
        _fits_prompt_response,
        _prompt_response,
        _keys("prompt", "rejected", *CONTEXT),
        (*_BEGINNING, _ANSWERS),
    ),
    "text": Format("text", lambda row: "text" in row, _no_conversations, _keys("text")),
}
_KNOWN = {name: entry.reads | COMMON for name, entry in FORMATS.items()}


def check_teacher(source: SourceConfig, place: str) -> None:
    """Checks OpenOrca's teacher by file name, because OpenOrca has no column for the model.

    Args:
      source: its ``teacher`` is the model whose answers are wanted.
      place: name of the file or dataset.

    Raises:
      UserError: the name says that the answers are another model's, or that they are mixed.
    """
    name = PurePath(place).name
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    teacher = re.sub(r"[^a-z0-9]", "", source.teacher.lower())
    is_35 = "gpt35" in plain or "35mgpt" in plain
    is_4 = "gpt4" in plain and not is_35
    if teacher.startswith("gpt4") and is_35:
        raise UserError(
            f"{place} holds answers of GPT-3.5, by its name, but the teacher is "
            f"{source.teacher!r}. OpenOrca has no column for the model: give the file "
            "1M-GPT4-Augmented.parquet, or set teacher: gpt-3.5."
        )
    if teacher.startswith("gpt35") and is_4:
        raise UserError(
            f"{place} holds answers of GPT-4, by its name, but the teacher is "
            f"{source.teacher!r}. Give the file 3_5M-GPT3_5-Augmented.parquet, or set "
            "teacher: gpt-4."
        )
    if source.dataset and place.lower().rstrip("/").endswith("open-orca/openorca"):
        raise UserError(
            f"The dataset {place} mixes answers of GPT-4 and GPT-3.5 and has no column for the "
            "model. Download the file of your teacher (1M-GPT4-Augmented.parquet for GPT-4) and "
            "give it under path."
        )
