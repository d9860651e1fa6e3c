"""Keys that a row or a turn may have beside its texts, and what each of them means.

No key is ignored in silence. A key has one of these meanings, whatever the format:

- a system text, or earlier turns (``SYSTEM``, ``HISTORY``): it stands before the row's own turns;
- why an answer ended (``FINISH``): one that was cut off or filtered is no answer;
- a verdict (``_MUST_HOLD``, ``_MUST_NOT_HOLD``, ``_WEIGHTS``): a row that it rejects is dropped,
  and a turn that it rejects is context only;
- tools, calls or thoughts (``TOOLS``, ``CALLS``, ``THOUGHTS``): they belong to the conversation or
  to the assistant's turn, and a row in which they have another form is dropped;
- a record about the row (``RECORDS``): it has no meaning for what is learnt.

A format names the other keys that it reads. What is left is counted as unread.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from proxykd_jax.texts.records import RowProblem

Record = Mapping[str, Any]

TOOL_CALLS = "tools or tool calls where they are not read"
REASONING = "reasoning where it is not read"
NO_CALL_THERE = "an answer that ended with a tool call which is not there"


def words(text: str) -> frozenset[str]:
    """The words of a text, for long lists of keys and values."""
    return frozenset(text.split())


SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history", "chat_history", "conversation_history")
CONTEXT = ("input", "context", "passage", "document", "article", "background")
FINISH = (
    "finish_reason",
    "finishReason",
    "stop_reason",
    "stopReason",
    "done_reason",
    "completion_reason",
)
RECORDS = words(
    "id _id idx index uuid key hash sha hash_id row_id prompt_id question_id message_id "
    "conversation_id conversation_hash session_id custom_id request_id parent_id turn_id "
    "sample_id source data_source dataset dataset_name origin subset category "
    "categories topic topics domain subject task_type task_name type tag tags label_type lang "
    "language locale model model_name model_id engine generator teacher provider annotator "
    "author user_id created created_at updated_at timestamp time date datetime version "
    "license url urls uri link difficulty level usage token_count tokens num_tokens num_turns "
    "turns rank score scores rating ratings gold tool_choice parallel_tool_calls temperature "
    "top_p seed object system_fingerprint"
)
# Keys that are verdicts only if they hold a truth value: KTO's label may also be a class, and what
# was rejected may be a text.
_TRUTH_ONLY = frozenset(("label", "rejected"))
_MUST_HOLD = words(
    "label valid is_valid accepted is_accepted approved is_approved keep train trainable "
    "training train_on_turn train_on_row loss learn complete is_complete completed "
    "is_completed finished is_finished"
)
_MUST_NOT_HOLD = words(
    "rejected is_rejected invalid is_invalid truncated is_truncated filtered is_filtered "
    "incomplete is_incomplete skip ignore exclude excluded deleted is_deleted mask masked"
)
_WEIGHTS = frozenset(["weight", "sample_weight", "loss_weight", "loss_mask", "train_weight"])
_FAILURES = frozenset(("error", "errors", "refusal"))
TOOLS = ("tools", "functions")
CALLS = ("tool_calls", "tool_call", "function_calls", "function_call")
THOUGHTS = (
    "reasoning_content",
    "reasoning",
    "reasoning_text",
    "thinking",
    "thinking_content",
    "thought",
    "thoughts",
    "chain_of_thought",
    "reasoning_details",
    "thinking_blocks",
)
CALL_ID = "tool_call_id"
_TOOLS = frozenset((*TOOLS, *CALLS, CALL_ID, "tool_results"))
_REASONING = frozenset(THOUGHTS)
_BESIDE_AN_ANSWER = frozenset(
    {*FINISH, *_MUST_HOLD, *_MUST_NOT_HOLD, *_WEIGHTS, *_FAILURES, *_TOOLS, *_REASONING, "status"}
)
# Keys that every format knows.
COMMON = RECORDS | _BESIDE_AN_ANSWER
TURN_KEYS = COMMON | {"role", "from", "content", "value"}
_RESULT_KEYS = TURN_KEYS | {"name"}
_TOOL_ROLES = words("tool function ipython observation tool_response tool_result function_response")

_SOMETIMES_READ = frozenset(FINISH) | _WEIGHTS | _MUST_HOLD | _MUST_NOT_HOLD
_WHOLE = words(
    "stop end_turn stop_sequence stop_token eos eos_token eot end ended complete completed "
    "finish finished done normal finish_reason_unspecified finish_reason_stop"
)
_CUT_OFF = words(
    "length max_tokens max_length max_output_tokens max_new_tokens max_completion_tokens "
    "token_limit limit model_length context_length context_length_exceeded "
    "model_context_window_exceeded truncated incomplete timeout abort aborted cancelled "
    "canceled interrupted pause_turn error failed insufficient_system_resource "
    "malformed_function_call "
    "finish_reason_max_tokens"
)
_FILTERED = words(
    "content_filter content_filtered filtered safety image_safety blocklist "
    "prohibited_content recitation spii refusal guardrail_intervened sensitive "
    "finish_reason_safety finish_reason_recitation"
)
_CALLED = frozenset(
    [
        "tool_calls",
        "tool_call",
        "tool_use",
        "function_call",
        "function_calls",
    ]
)
_NOTHING = frozenset({"", "[]", "{}", "null", "none", "nan"})
_SHOWN = 80


def row_problem(
    row: Record,
    *,
    prompts_only: bool = False,
    reads_tools: bool = False,
    reads_thoughts: bool = False,
) -> str | None:
    """Why a whole row is dropped, by the keys beside its texts; None if they allow it.

    Args:
      row: the row.
      prompts_only: its answer is not wanted, so verdicts on the answer do not count.
      reads_tools, reads_thoughts: the caller reads its tools and calls, its thoughts.
    """
    if _BESIDE_AN_ANSWER.isdisjoint(row):
        return None
    if not reads_tools and says_any(row, _TOOLS.intersection(row)) is not None:
        return TOOL_CALLS
    if prompts_only:
        return None
    verdict = _verdict(row) or finish_problem(row)
    if verdict is None and not reads_thoughts and says_any(row, THOUGHTS) is not None:
        return REASONING
    return verdict


def says_any(record: Record, keys: Iterable[str]) -> Any:
    """The value of the first of some keys that says anything, or None."""
    return next((record[key] for key in keys if key in record and _holds(record[key])), None)


def thought_of(record: Record) -> str | None:
    """The thought beside an answer, or None.

    Raises:
      RowProblem: it is no text.
    """
    if _REASONING.isdisjoint(record):
        return None
    found = says_any(record, THOUGHTS)
    return None if found is None else thought_text(found)


def thought_text(value: Any) -> str:
    """The text of a thought: a text, or a list of parts that hold one.

    Raises:
      RowProblem: it is no text.
    """
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    texts = []
    for part in parts:
        if isinstance(part, Mapping):
            keys = ("thinking", "reasoning", "text", "content", "summary")
            nothing = "" if "data" in part else None  # it is encrypted
            part = next((part[key] for key in keys if holds_text(part.get(key))), nothing)
        if isinstance(part, list):
            part = thought_text(part)
        if not isinstance(part, str):
            raise RowProblem(REASONING)
        texts.append(part)
    return "\n\n".join(text for text in texts if text)


def is_tool_role(role: Any) -> bool:
    """Whether a turn is a tool's result."""
    return isinstance(role, str) and role.strip().lower() in _TOOL_ROLES


def is_context_only(turn: Record) -> bool:
    """Whether a turn is flagged as context, which is not learnt."""
    return _verdict(turn) is not None


def finish_problem(record: Record) -> str | None:
    """Why an answer that ended like this is dropped, or None."""
    for key in FINISH:
        if key not in record:
            continue
        value = _word(record[key])
        if value in _CUT_OFF:
            return f"an answer that was cut off ({key}: {value})"
        if value in _FILTERED:
            return f"an answer that was filtered ({key}: {value})"
        if value in _CALLED:
            return NO_CALL_THERE
    if "status" in record and _word(record["status"]) in ("incomplete", "failed", "error"):
        return f"an answer that was cut off (status: {_word(record['status'])})"
    for key in sorted(_FAILURES.intersection(record)):
        if _holds(record[key]):
            return f"a request that failed or was refused ({key})"
    return None


def unread_keys(
    row: Record, known: frozenset[str], first_of: Iterable[tuple[str, ...]] = ()
) -> Iterator[tuple[str, str]]:
    """(key, example) of the keys that hold text which nobody reads, in the row's order.

    Args:
      row: the row, or a turn.
      known: keys that are read, or that are known to have no meaning.
      first_of: spellings of one thing, of which the first that is there is read.
    """
    extra = row.keys() - known
    if not extra and _SOMETIMES_READ.isdisjoint(row):
        return
    read = {next((key for key in keys if row.get(key) is not None), None) for keys in first_of}
    for key, value in row.items():
        if (key in extra and key not in read and holds_text(value)) or (
            key in _SOMETIMES_READ and not _is_understood(key, value)
        ):
            yield key, shown(value)


def unread_turn_keys(turns: Any) -> Iterator[tuple[str, str]]:
    """``unread_keys`` of a list of turns."""
    if isinstance(turns, list):
        for turn in turns:
            if isinstance(turn, Mapping) and len(turn) > 2 and ("role" in turn or "from" in turn):
                is_result = is_tool_role(turn.get("role", turn.get("from")))
                yield from unread_keys(turn, _RESULT_KEYS if is_result else TURN_KEYS)


def holds_text(value: Any) -> bool:
    """Whether a value is a text that is not blank, or contains one."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, Mapping):
        return any(holds_text(item) for item in value.values())
    return isinstance(value, list) and any(holds_text(item) for item in value)


def shown(value: Any) -> str:
    """The beginning of a value, for readers."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(text[: 4 * _SHOWN].split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _verdict(record: Record) -> str | None:
    """Which flag rejects a row or a turn, or None."""
    for key in sorted(_MUST_HOLD.intersection(record)):
        if _is(record[key], False, key):
            return f"flagged as not to be learnt ({key}: false)"
    for key in sorted(_MUST_NOT_HOLD.intersection(record)):
        if _is(record[key], True, key):
            return f"flagged as not to be learnt ({key}: true)"
    for key in sorted(_WEIGHTS.intersection(record)):
        if _is(record[key], False, key):
            return f"flagged as not to be learnt ({key}: 0)"
    return None


def _is(value: Any, truth: bool, key: str) -> bool:
    """Whether a flag has this value; files keep flags as truth values, numbers and words."""
    if key in _TRUTH_ONLY:
        return value is truth
    if isinstance(value, str):
        words = ("true", "1", "yes") if truth else ("false", "0", "0.0", "no")
        return value.strip().lower() in words
    return isinstance(value, bool | int | float) and value == truth


def _is_understood(key: str, value: Any) -> bool:
    """Whether a key that speaks about an answer has a value with a known meaning."""
    if key in _WEIGHTS and not isinstance(value, str):
        return value in (None, 0, 1)  # otherwise rows would weigh differently
    if not isinstance(value, str):
        return True
    if key in FINISH:
        return any(_word(value) in w for w in (_NOTHING, _WHOLE, _CUT_OFF, _FILTERED, _CALLED))
    flagged = any(_is(value, truth, key) for truth in (True, False))
    return flagged or not value.strip() or key == "rejected"


def _word(value: Any) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.strip().lower().replace("-", "_") if isinstance(value, str) else ""


def _holds(value: Any) -> bool:
    """Whether a value says anything: libraries store absent ones as empty texts and structs."""
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    if isinstance(value, Mapping):
        return any(_holds(item) for item in value.values())
    if isinstance(value, list):
        return any(_holds(item) for item in value)
    return value is not None and value is not False and value != 0
