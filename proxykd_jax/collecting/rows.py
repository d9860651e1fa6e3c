"""Rows of the files, and which requests are still wanted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from proxykd_jax.collecting.ledger import (
    ANSWERED,
    BATCHED,
    DOUBT,
    FAILED,
    SET_ASIDE,
    Entry,
)
from proxykd_jax.collecting.replies import Answer
from proxykd_jax.collecting.requests import Request
from proxykd_jax.config.schema import CollectConfig


def unwanted(
    entry: Entry | None, config: CollectConfig, *, retry_failed: bool = False
) -> str | None:
    """Why a request is not to be sent, in a word; None if it is.

    Args:
      entry: what the ledger knows of it.
      config: the section ``collect``.
      retry_failed: whether what the server refused for good is wanted again.
    """
    if entry is None:
        return None
    if entry.state in (ANSWERED, SET_ASIDE):
        return "known"
    if entry.state == BATCHED:
        return "in a batch file"
    if entry.state == DOUBT and config.in_doubt == "hold":
        return "held"
    if entry.state == FAILED and not retry_failed:
        return "refused before"
    return None


def answer_row(
    config: CollectConfig,
    request: Request,
    answer: Answer,
    *,
    attempts: int,
    cost: float | None,
) -> dict[str, Any]:
    """A line of ``answers.jsonl``, or of ``set_aside.log`` for any other outcome.

    Args:
      config: the section ``collect``.
      request, answer: what was asked and came.
      attempts: how often it was sent.
      cost: what it cost, if that is known.
    """
    about = {
        "id": request.key,
        "sample": request.sample,
        "origin": request.origin,
        "model": config.model,
        "served_model": answer.served_model,
        "parameters": dict(config.parameters),
        "finish_reason": answer.finish_reason,
        "usage": None if answer.usage is None else dict(answer.usage),
        "cost": cost,
        "attempts": attempts,
        "created": now_text(),
    }
    if answer.outcome != "answered":
        # No key here is one that a reader of corpora looks for.
        why = {"outcome": answer.outcome, "reason": answer.reason[:300]}
        return {**about, **why, "asked": list(request.messages), "said": answer.text}
    if answer.logprobs is not None:
        about["logprobs"] = answer.logprobs
    # Answers within the prompt may be anyone's; a weight of 0 keeps readers from learning them.
    context = [
        {**message, "weight": 0} if message["role"] == "assistant" else message
        for message in request.messages
    ]
    return {"messages": [*context, {"role": "assistant", "content": answer.text}], **about}


def failed_row(
    request: Request, reason: str, *, final: bool, before: Sequence[str], attempts: int
) -> dict[str, Any]:
    """A line of ``failed.log``.

    Args:
      request: what was asked.
      reason: why the last attempt gave no answer.
      final: whether it would fail again.
      before: reasons of earlier attempts; the last ten are kept.
      attempts: how often it was sent.
    """
    return {
        "id": request.key,
        "final": final,
        "reason": reason,
        "before": list(before[-10:]),
        "attempts": attempts,
        "asked": list(request.messages),
        "sample": request.sample,
        "origin": request.origin,
        "created": now_text(),
    }


def now_text() -> str:
    """The time, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
