"""Prompts of any corpus format become requests, each with a key of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from proxykd_jax.config.schema import CollectConfig
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, TextRow

# A request's key in hexadecimal digits; batch services take at most 64 characters.
_KEY_DIGITS = 32
_MESSAGE_OVERHEAD_TOKENS = 16
_BYTES_PER_TOKEN = 4
_NAMES_OF_MOST_TOKENS = ("max_completion_tokens", "max_tokens")


@dataclass(frozen=True, slots=True)
class Request:
    """One answer that is wanted.

    Attributes:
      key: hash of model, parameters, messages and sample.
      messages: the conversation up to the user's last message.
      sample: index of the answer among those to the same prompt.
      origin: where the prompt was read.
    """

    key: str
    messages: tuple[dict[str, str], ...]
    sample: int
    origin: str

    @property
    def prompt_bytes(self) -> int:
        """Bytes of the messages' texts in UTF-8."""
        return sum(len(message["content"].encode()) for message in self.messages)

    @property
    def about_prompt_tokens(self) -> int:
        """A guess at the prompt's tokens, at four bytes a token."""
        return self.prompt_bytes // _BYTES_PER_TOKEN + 4 * len(self.messages)

    @property
    def most_prompt_tokens(self) -> int:
        """A bound on the prompt's tokens: no tokenizer of bytes needs more than one a byte."""
        return self.prompt_bytes + _MESSAGE_OVERHEAD_TOKENS * (len(self.messages) + 1)


def settings_of(config: CollectConfig) -> dict[str, Any]:
    """What all answers of a folder share: everything that decides how the teacher answers."""
    return {
        "model": config.model,
        "parameters": dict(config.parameters),
        "top_logprobs": config.top_logprobs,
    }


def most_answer_tokens(parameters: Mapping[str, Any]) -> int | None:
    """The bound on an answer's tokens that the parameters set, if they set one."""
    found = (parameters.get(name) for name in _NAMES_OF_MOST_TOKENS)
    return next((value for value in found if type(value) is int and value > 0), None)


def body_of(config: CollectConfig, request: Request) -> dict[str, Any]:
    """The JSON of a request to ``/chat/completions``."""
    body = {"model": config.model, "messages": list(request.messages), **config.parameters}
    if "seed" in body:  # else all samples of a prompt would be the same
        body["seed"] += request.sample
    if config.top_logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
    return body


def read_requests(config: CollectConfig, drops: Drops) -> Iterator[Request]:
    """Every request, in the order of the prompts; a repeated prompt has the same key again.

    Args:
      config: its ``prompts`` are read lazily, in constant memory.
      drops: counts rows that give no prompt.

    Raises:
      UserError: a source of prompts is missing, damaged or of unknown format.
    """
    settings = json.dumps(settings_of(config), sort_keys=True, ensure_ascii=False)
    for index, source in enumerate(config.prompts):
        for row in read_source(source, prompts_only=True, drops=drops, source_index=index):
            messages = _messages(row)
            text = json.dumps(messages, ensure_ascii=False)
            for sample in range(config.samples):
                whole = f"{settings}\n{text}\n{sample}"
                key = hashlib.sha256(whole.encode()).hexdigest()[:_KEY_DIGITS]
                yield Request(key, messages, sample, row.origin)


def _messages(row: TextRow) -> tuple[dict[str, str], ...]:
    """A conversation's messages; a plain text is one message of the user."""
    if row.text is not None:
        return ({"role": "user", "content": row.text},)
    return tuple({"role": message.role, "content": message.content} for message in row.messages)
