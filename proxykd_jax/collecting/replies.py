"""What a reply means: an answer of some kind, another try, a refusal, or the end of the run."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxykd_jax.collecting.exchange import Reply
from proxykd_jax.texts.conversations import checked_text
from proxykd_jax.texts.records import RowProblem

Outcome = Literal["answered", "empty", "cut", "filtered", "refused", "unusable"]

_COMPLETE = {"stop", "eos", "end_turn", "stop_sequence"}
_CUT = {
    *("length", "max_tokens", "max_output_tokens", "model_length"),
    "model_context_window_exceeded",
}
_FILTERED = {"content_filter", "safety", "recitation", "prohibited_content", "sensitive"}
_REFUSED = {"refusal"}
# Codes of errors that say that a filter stopped the prompt.
_FILTER_CODES = {
    *("content_filter", "content_policy_violation", "moderation_blocked"),
    *("data_inspection_failed", "responsibleaipolicyviolation"),
}
# Codes and types of errors that no waiting mends.
_EXHAUSTED = {
    *("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"),
    *("insufficient_balance", "quota_exceeded", "account_deactivated"),
}
# The server is there and asks for patience, or the same request is still being answered (409).
_BUSY = {409, 425, 429}
_PASSES = {408, *_BUSY}
# Every other request would meet the same: key, payment, permission, address.
_HOPELESS = {401, 402, 403, 404, 405, 407}
_LONGEST_ASKED_S = 3600.0
_LONGEST_REFUSAL = 300
# Whole answers that say nothing but no.
_NOT_ABLE = r"(('m| am| are)? (unable|not able) to| can't| cannot| can not| won't)\b.*"
_REFUSALS = (
    rf"((i'm|i am|we're|we are) )?(very |so |really )?(sorry|afraid)[,.]?( but)?"
    rf"( as an ai[^.]{{0,60}},?)? (i|we){_NOT_ABLE}",
    rf"(i apologi[sz]e|my apologies|unfortunately)[,.]?( but)? (i|we){_NOT_ABLE}",
    r"(as an ai[^.]{0,60},? )?i (can't|cannot|can not|won't) (help|assist|comply) with (that|this)"
    r"\b.*",
)


@dataclass(frozen=True)
class Answer:
    """A reply that ends the request.

    Attributes:
      outcome: only ``answered`` is training data.
      reason: why it is something else, in words.
      text: the answer, perhaps empty.
      paid: whether the server charges for it.
    """

    outcome: Outcome
    text: str = ""
    reason: str = ""
    finish_reason: str | None = None
    served_model: str | None = None
    usage: Mapping[str, int] | None = None
    logprobs: Any = None
    paid: bool = True


@dataclass(frozen=True)
class Again:
    """A failure that may pass.

    Attributes:
      wait_s: how long the server asks to wait, if it does.
      busy: the server refuses for lack of capacity, which does not count as a failed try.
      status: of the reply.
    """

    reason: str
    status: int
    wait_s: float | None = None
    busy: bool = False


@dataclass(frozen=True)
class Refused:
    """The server does not accept this request; another one may be fine."""

    reason: str
    status: int


@dataclass(frozen=True)
class Hopeless:
    """The server would refuse every request, so the run ends."""

    reason: str


Verdict = Answer | Again | Refused | Hopeless


def compiled(refusals: Sequence[str] | None) -> list[re.Pattern[str]]:
    """The patterns of refusals, or the usual ones. Upper and lower case are not distinguished."""
    found = _REFUSALS if refusals is None else refusals
    return [re.compile(pattern, re.IGNORECASE) for pattern in found]


def judge(reply: Reply, refusals: Sequence[re.Pattern[str]]) -> Verdict:
    """What a complete reply means.

    Args:
      reply: of ``/chat/completions``.
      refusals: patterns; a short answer that one of them matches as a whole is a refusal.
    """
    try:
        # NaN and infinities are not JSON, but some servers write them for log-probs.
        value = json.loads(
            reply.content.decode(), parse_constant=lambda name: None, parse_float=_finite
        )
    except (ValueError, RecursionError):
        value = None
    if reply.status != 200:
        return _judge_error(reply.status, value, reply)
    if not isinstance(value, dict):
        return Again("its reply under status 200 is not a JSON object", 200)
    choices = value.get("choices")
    if not isinstance(choices, list) or not choices:
        error = value.get("error")
        code = error.get("code") if isinstance(error, dict) else None
        if type(code) is int and code != 200:
            return _judge_error(code, value, reply)
        if error:
            if _codes(value) & _EXHAUSTED:
                return Hopeless(f"quota is exhausted: {_said(value, reply)}")
            return Again(f"an error under status 200: {_said(value, reply)}", 200)
        return Again("its reply has no choices", 200)
    if len(choices) != 1 or not isinstance(choices[0], dict):
        return Again(f"its reply has {len(choices)} choices, or one that is no object", 200)
    message = choices[0].get("message")
    if not isinstance(message, dict):
        return Again("its reply has no message", 200)
    return _judge_choice(value, choices[0], message, refusals)


def usage_of(value: Any, names: tuple[str, str] = ("prompt_tokens", "completion_tokens")) -> Any:
    """Tokens of prompt and answer, if the server reports both as counts."""
    if not isinstance(value, dict):
        return None
    counts = [value.get(name) for name in names]
    if not all(type(count) is int and 0 <= count < 2**53 for count in counts):
        return None
    return dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))


def answer_of(
    text: str,
    finish_reason: str | None,
    refusals: Sequence[re.Pattern[str]],
    *,
    refusal: str | None = None,
    served_model: str | None = None,
    usage: Mapping[str, int] | None = None,
    logprobs: Any = None,
) -> Answer:
    """Which kind of answer a text is.

    Args:
      text: the answer.
      finish_reason: why the server ended it.
      refusals: as in ``judge``.
      refusal: the server's own words of a refusal.
      served_model, usage, logprobs: copied into the result.
    """

    def found(outcome: Outcome, reason: str = "") -> Answer:
        shown = text or refusal or ""
        return Answer(outcome, shown, reason, finish_reason, served_model, usage, logprobs)

    ended = str(finish_reason).lower()
    if ended in _FILTERED:
        return found("filtered", f"finish_reason {finish_reason}")
    if refusal or ended in _REFUSED:
        return found("refused", "the server marks it as a refusal")
    if ended in _CUT:
        return found("cut", f"finish_reason {finish_reason}")
    if ended not in _COMPLETE:
        return found("unusable", f"finish_reason {finish_reason}")
    try:
        checked_text(text, "no text")
    except RowProblem as problem:
        return found("empty" if str(problem) == "no text" else "unusable", str(problem))
    if is_refusal(text, refusals):
        return found("refused", "its text is a refusal")
    return found("answered")


def is_refusal(text: str, refusals: Sequence[re.Pattern[str]]) -> bool:
    """Whether a short text is nothing but a refusal."""
    text = " ".join(text.replace("\u2019", "'").split())
    return len(text) <= _LONGEST_REFUSAL and any(pattern.fullmatch(text) for pattern in refusals)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


def _judge_choice(
    value: dict[str, Any],
    choice: dict[str, Any],
    message: dict[str, Any],
    refusals: Sequence[re.Pattern[str]],
) -> Verdict:
    content, finish = message.get("content"), choice.get("finish_reason")
    if isinstance(content, list):  # parts
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(content):
            content = "".join(texts)
    if content is not None and not isinstance(content, str):
        return Again("its reply has content that is not text", 200)
    if finish is not None and not isinstance(finish, str):
        return Again("its reply has a finish_reason that is not text", 200)
    refusal, logprobs, model = message.get("refusal"), choice.get("logprobs"), value.get("model")
    return answer_of(
        content or "",
        finish,
        refusals,
        refusal=refusal if isinstance(refusal, str) else None,
        served_model=model if isinstance(model, str) else None,
        usage=usage_of(value.get("usage")),
        logprobs=logprobs.get("content") if isinstance(logprobs, dict) else None,
    )


def _judge_error(status: int, value: Any, reply: Reply) -> Verdict:
    codes, said = _codes(value), _said(value, reply)
    reason = f"status {status}, {said}"
    if status in (400, 403) and (codes & _FILTER_CODES or _is_moderated(value)):
        return Answer("filtered", reason=reason, paid=False)
    if codes & _EXHAUSTED:
        return Hopeless(f"quota is exhausted: {reason}")
    if status in _PASSES or status >= 500:
        asked_s = _asked_s(reply.headers)
        if asked_s is not None and asked_s > _LONGEST_ASKED_S:
            return Hopeless(f"it asks to wait for {asked_s:.0f} s: {reason}")
        busy = status in _BUSY or (status == 503 and asked_s is not None)
        return Again(reason, status, asked_s, busy)
    if status in _HOPELESS:
        return Hopeless(reason)
    if 300 <= status < 400:
        return Hopeless(f"status {status}: it redirects; give the final address as collect.url")
    if 400 <= status < 500:
        return Refused(reason, status)
    return Again(reason, status)


def _error_of(value: Any) -> Any:
    return value.get("error", value) if isinstance(value, dict) else value


def _codes(value: Any) -> set[str]:
    error = _error_of(value)
    if not isinstance(error, dict):
        return set()
    inner = error.get("innererror")
    found = [error.get("code"), error.get("type")]
    found.append(inner.get("code") if isinstance(inner, dict) else None)
    return {code.lower() for code in found if isinstance(code, str)}


def _is_moderated(value: Any) -> bool:
    """Whether an error carries the reasons of a moderation, as OpenRouter's do."""
    error = _error_of(value)
    extra = error.get("metadata") if isinstance(error, dict) else None
    return isinstance(extra, dict) and bool(extra.get("reasons"))


def _said(value: Any, reply: Reply) -> str:
    error = _error_of(value)
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error.get("code")
    text = error if isinstance(error, str) else reply.content[:2000].decode("utf-8", "replace")
    return text or "without a word"


def _asked_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait: a number, or a date."""
    for name, unit_s in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) * unit_s
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None
