"""Formats of corpora: recognises a row's format and turns the row into conversations.

A format has three parts: the keys that it needs (for messages to the user), a test whether a row
has them, and a function from a row to conversations. The formats of benchmarks are in
``benchmark_files.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.conversations import QUOTED, RawTurns
from proxykd_jax.texts.records import RowProblem

Record = Mapping[str, Any]


class Format(NamedTuple):
    """How rows of one format are read.

    Attributes:
      keys: the keys that a row needs, in words.
      fits: whether a row has them.
      conversations: the conversations of a row; with ``prompts_only`` the answer may be missing.
        Raises RowProblem for an unusable row.
    """

    keys: str
    fits: Callable[[Record], bool]
    conversations: Callable[[Record, SourceConfig, bool], list[RawTurns]]


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}
_OPENAI_ROLES = {"developer": "system"}
_ANSWER_KEYS = ("response", "completion")
_ALPACA_ANSWER_KEYS = ("output", "response")
_NECTAR_TURN = re.compile(r"\n\n(Human|Assistant):")


def _as_list(value: Any) -> list[Any] | None:
    """A list of objects; some libraries store it as an object of lists."""
    if isinstance(value, Mapping) and value and all(isinstance(v, list) for v in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            return [
                dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)
            ]
    return value if isinstance(value, list) else None


def _first_of(row: Record, keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _content(content: Any) -> Any:
    """Joins OpenAI's list of parts if all parts are text."""
    parts = _as_list(content)
    if not parts:
        return content
    if not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        raise RowProblem("content that is not text")
    texts = [part.get("text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise RowProblem("content that is not text")
    return "".join(texts)


def _chat(value: Any, role_key: str, content_key: str, roles: Mapping[str, str]) -> RawTurns:
    turns = _as_list(value)
    if not turns:
        raise RowProblem("no prompt")
    if not all(isinstance(turn, Mapping) for turn in turns):
        raise RowProblem("content that is not text")
    # A tool call has no content. It is not an answer that a student could learn.
    return [(_role(turn, role_key, roles), _content(turn.get(content_key))) for turn in turns]


def _role(turn: Record, key: str, roles: Mapping[str, str]) -> str | None:
    role = turn.get(key)
    if not isinstance(role, str):
        return None
    role = roles.get(role, role)
    # As in OpenAI's files for fine-tuning: an answer of weight 0 is not learnt.
    is_quoted = role == "assistant" and turn.get("weight") == 0 and "weight" in turn
    return QUOTED if is_quoted else role


def _is_chat(value: Any, role_key: str = "role") -> bool:
    turns = _as_list(value)
    if turns is None:
        return False
    return not turns or (isinstance(turns[0], Mapping) and role_key in turns[0])


def _messages(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    if "messages" in row:
        return [_chat(row["messages"], "role", "content", _OPENAI_ROLES)]
    given = row["input"]
    given = given["messages"] if isinstance(given, Mapping) and "messages" in given else given
    turns = list(_chat(given, "role", "content", _OPENAI_ROLES))
    if row.get("preferred_output"):
        turns.extend(_chat(row["preferred_output"], "role", "content", _OPENAI_ROLES))
    return [turns]


def _fits_messages(row: Record) -> bool:
    if "messages" in row:
        return row["messages"] is None or _is_chat(row["messages"])
    given = row.get("input")
    given = given.get("messages", given) if isinstance(given, Mapping) else given
    return "preferred_output" in row and _is_chat(given)


def _prompt_response(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    prompt, answer = row.get("prompt"), _first_of(row, _ANSWER_KEYS)
    turns: list[tuple[Any, Any]] = [("system", row.get("system") or row.get("system_prompt"))]
    if _is_chat(prompt):
        turns.extend(_chat(prompt, "role", "content", _OPENAI_ROLES))
    else:
        turns.append(("user", prompt))
    if isinstance(answer, list) and _is_chat(answer):
        turns.extend(_chat(answer, "role", "content", _OPENAI_ROLES))
    elif answer is not None or not prompts_only:
        turns.append(("assistant", answer))
    if turns[0][1] is None:
        del turns[0]
    return [turns]


def _fits_prompt_response(row: Record) -> bool:
    prompt = row.get("prompt")
    return "prompt" in row and (prompt is None or isinstance(prompt, str) or _is_chat(prompt))


def _alpaca(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    instruction, given = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(given, str) and given.strip():
        instruction = f"{instruction}\n\n{given}"
    elif given is not None and not isinstance(given, str):
        raise RowProblem("content that is not text")
    system = row.get("system") or row.get("system_prompt")
    turns = [("system", system)] if system else []
    return [[*turns, ("user", instruction), ("assistant", _first_of(row, _ALPACA_ANSWER_KEYS))]]


def _sharegpt(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    turns = list(_chat(row["conversations"], "from", "value", _SHAREGPT_ROLES))
    if row.get("system"):
        turns.insert(0, ("system", row["system"]))
    return [turns]


def _openorca(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    return [
        [
            ("system", row.get("system_prompt")),
            ("user", row.get("question")),
            ("assistant", row.get("response")),
        ]
    ]


def _nectar(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise RowProblem("empty prompt" if prompt is None else "content that is not text")
    head, *parts = _NECTAR_TURN.split(f"\n\n{prompt.lstrip()}")
    if head.strip() or not parts:
        raise RowProblem("Nectar prompt that does not begin with 'Human:'")
    turns = [
        ("user" if who == "Human" else "assistant", text.strip())
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    if prompts_only:
        return [turns]
    # Selected by model name, not by rank: the teacher is rarely ranked first.
    answers = [
        answer.get("answer")
        for answer in _as_list(row.get("answers")) or []
        if isinstance(answer, Mapping) and str(answer.get("model")).startswith(source.teacher)
    ]
    if not answers:
        raise RowProblem("no answer of the teacher")
    return [[*turns, ("assistant", answer)] for answer in answers]


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


def _no_conversations(row: Record, source: SourceConfig, prompts_only: bool) -> list[RawTurns]:
    raise AssertionError("plain texts are rows themselves")


# With format auto they are tried in this order, the most specific first.
FORMATS: dict[str, Format] = {
    "nectar": Format("prompt, answers [{answer, model}]", _fits_nectar, _nectar),
    "openorca": Format(
        "system_prompt, question, response",
        lambda row: "question" in row and "system_prompt" in row,
        _openorca,
    ),
    "messages": Format(
        "messages [{role, content}], or input and preferred_output", _fits_messages, _messages
    ),
    "sharegpt": Format(
        "conversations [{from, value}]",
        lambda row: _is_chat(row.get("conversations"), "from"),
        _sharegpt,
    ),
    "alpaca": Format(
        "instruction and output or response, perhaps input",
        lambda row: "instruction" in row,
        _alpaca,
    ),
    "prompt_response": Format(
        "prompt and response or completion", _fits_prompt_response, _prompt_response
    ),
    "text": Format("text", lambda row: "text" in row, _no_conversations),
}


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
