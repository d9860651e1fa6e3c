"""A file of a teacher's answers to prompts that stand in other files.

Read are ``{id or prompt, response}``, FastChat's answers, and the outputs of OpenAI's and
Anthropic's batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.texts.conversations import RawTurn
from proxykd_jax.texts.formats import answer_turn
from proxykd_jax.texts.json_files import read_json_records
from proxykd_jax.texts.normalise import normalise_text
from proxykd_jax.texts.records import RowProblem
from proxykd_jax.texts.row_keys import (
    COMMON,
    FINISH,
    row_problem,
    thought_of,
    unread_keys,
)
from proxykd_jax.texts.teachers import another_model, model_of

Record = Mapping[str, Any]
_NAMES = frozenset(("id", "custom_id", "prompt"))
_ANSWER_KEYS = COMMON | {"response", "prompt"}


@dataclass
class Answers:
    """A teacher's answers to prompts that are stored elsewhere, by id and by prompt.

    Ids are compared as texts, so 7 equals "7". A prompt may have several answers. All answers are
    in memory, because a benchmark's training set is small.
    """

    by_id: dict[str, list[RawTurn]] = field(default_factory=dict)
    by_prompt: dict[bytes, list[RawTurn]] = field(default_factory=dict)

    def find(self, identity: str | None, prompt: str) -> list[RawTurn]:
        """The answers to a prompt, by its id if known, otherwise by its text.

        Raises:
          RowProblem: there is none.
        """
        found = self.by_id.get(identity) if identity is not None else None
        found = found or self.by_prompt.get(_prompt_key(prompt))
        if not found:
            raise RowProblem("no answer of the teacher")
        return found


def load_answers(path: str, teacher: str | None = None) -> Answers:
    """Reads ``{id or prompt, response}``, FastChat's ``{question_id, choices}``, or a batch.

    The outputs of batches have ``custom_id`` as the id. An answer that was cut off, filtered,
    refused or flagged keeps the reason why it is dropped, and so does a request that failed, and an
    answer whose model is not ``teacher``, if that is given.

    Raises:
      UserError: the file is missing or damaged, or a row has neither id nor prompt.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"The file of answers {path} does not exist.")
    answers = Answers()
    for record, origin in read_json_records(file):
        values: list[RawTurn]
        if "question_id" in record and isinstance(record.get("choices"), list):
            identity, prompt = record["question_id"], None
            values = [
                _answer(c.get("turns"), row_problem(c))
                for c in record["choices"]
                if isinstance(c, Mapping)
            ]
        elif "custom_id" in record and isinstance(record.get("result"), Mapping):
            identity, prompt = record["custom_id"], None
            values = [_of_anthropic(record["result"])]
        elif "custom_id" in record and not isinstance(record.get("response"), str):
            identity, prompt = record["custom_id"], None
            values = _of_openai(record)
        elif "response" in record and not _NAMES.isdisjoint(record):
            identity, prompt = record.get("id", record.get("custom_id")), record.get("prompt")
            left = tuple((f"answers.{k}", v) for k, v in unread_keys(record, _ANSWER_KEYS))
            values = [_answer_of(record, "response")._replace(unread=left)]
        else:
            raise UserError(
                f"{origin} has the keys {', '.join(record)}; an answer needs response and id or "
                "prompt (or FastChat's question_id and choices, or the custom_id of a batch)."
            )
        another = another_model(_model(record), teacher)
        if another is not None:
            values = [_failed(another)]
        if identity is None and not isinstance(prompt, str):
            raise UserError(f"{origin}: neither id nor prompt says what this answers.")
        if identity is not None:
            _append(answers.by_id.setdefault(str(identity), []), values)
        if isinstance(prompt, str):
            _append(answers.by_prompt.setdefault(_prompt_key(prompt), []), values)
    return answers


def _answer(content: Any, problem: str | None) -> RawTurn:
    return RawTurn("assistant", content if problem is None else RowProblem(problem))


def _answer_of(record: Record, key: str) -> RawTurn:
    """The answer under a key, with the thought beside it."""
    problem = row_problem(record, reads_thoughts=True)
    try:
        return _answer(record.get(key), problem)._replace(thought=thought_of(record))
    except RowProblem as unreadable:
        return _answer(None, str(unreadable))


def _model(record: Record) -> str | None:
    """The model that an answer, a reply or a message names, or None."""
    reply, result = record.get("response"), record.get("result")
    body = reply.get("body") if isinstance(reply, Mapping) else None
    message = result.get("message") if isinstance(result, Mapping) else None
    holders = (holder for holder in (record, body, message) if isinstance(holder, Mapping))
    return next((model for holder in holders if (model := model_of(holder)) is not None), None)


def _of_openai(record: Record) -> list[RawTurn]:
    """The answers in a line of the output or of the errors of OpenAI's batches."""
    response = record.get("response")
    response = response if isinstance(response, Mapping) else {}
    body, status = response.get("body"), response.get("status_code")
    choices = body.get("choices") if isinstance(body, Mapping) else None
    error = record.get("error")
    if isinstance(error, Mapping) and not choices:
        return [_failed(f"a request that failed ({error.get('code') or 'error'})")]
    if status not in (None, 200):
        return [_failed(f"a request that failed (status {status})")]
    found = []
    for choice in choices if isinstance(choices, list) else []:
        message = choice.get("message") if isinstance(choice, Mapping) else None
        if isinstance(message, Mapping):
            ended = {key: choice[key] for key in FINISH if key in choice}
            found.append(_of_service({**message, **ended}))
    return found or [_failed("a request that failed (no answer came)")]


def _of_anthropic(result: Record) -> RawTurn:
    """The answer in a line of the results of Anthropic's batches."""
    message = result.get("message")
    if result.get("type") != "succeeded" or not isinstance(message, Mapping):
        return _failed(f"a request that failed ({result.get('type') or 'no answer came'})")
    return _of_service(message)


def _of_service(message: Record) -> RawTurn:
    try:
        turn = answer_turn(message)
    except RowProblem as problem:
        return _failed(str(problem))
    return turn if turn.problem is None else _failed(turn.problem)


def _failed(reason: str) -> RawTurn:
    return RawTurn("assistant", RowProblem(reason))


def _append(kept: list[RawTurn], values: list[RawTurn]) -> None:
    kept.extend(value for value in values if value not in kept)


def _prompt_key(prompt: str) -> bytes:
    text = normalise_text(prompt).encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).digest()[:16]
