"""Gold answers: the correct final answer to a question, if its source gives one.

Benchmark formats contain it; rows of other formats may have it under ``gold``. Golds are not part
of the corpus. They are read again from the sources, whose digests the corpus records, and looked up
by the tokens of a row's prompt. A model never sees them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from proxykd_jax.config import Config, SourceConfig
from proxykd_jax.texts.benchmark_files import (
    BENCHMARK_KEYS,
    benchmark_conversations,
    benchmark_item,
)
from proxykd_jax.texts.conversations import expand_turns
from proxykd_jax.texts.formats import conversations_of
from proxykd_jax.texts.normalise import normalised_words
from proxykd_jax.texts.readers import read_records
from proxykd_jax.texts.records import RowProblem, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import Tokenizer

Golds = Mapping[bytes, list["Gold"]]
_BATCH_ROWS = 512
# Text that introduces a final answer; the last occurrence counts.
_MARKS = re.compile(r"-->|####|answer\s*(?:is|:)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
_LABEL = re.compile(r"\(([A-Z0-9])\)|(?<!\w)([A-Z0-9])(?!\w)")
_BRACKETED = re.compile(r"\(([A-Z0-9])\)")
_LABEL_KEYS = ("answerKey", "label", "answer", "gold")


class Gold(NamedTuple):
    """The correct answer to a question: a text, or the labels of its right choices, "B", "ACD"."""

    text: str
    choices: tuple[tuple[str, str], ...] = ()


def read_golds(config: Config, tokenizer: Tokenizer) -> Golds:
    """The golds of the corpus's sources, keyed by the bytes of a prompt's int32 tokens.

    Raises:
      UserError: a source is missing or damaged.
    """
    renderer = Renderer.of(tokenizer, config.corpus)
    golds: dict[bytes, list[Gold]] = {}
    for source in config.corpus.sources:
        found: list[tuple[TextRow, Gold]] = []
        for name, record, origin in read_records(source):
            found += _rows_with_gold(name, record, origin, source)
        for start in range(0, len(found), _BATCH_ROWS):
            some = found[start : start + _BATCH_ROWS]
            encoded = renderer.encode_batch([row for row, _ in some], source, prompts_only=True)
            for (_, gold), row in zip(some, encoded, strict=True):
                if row.drop is None:
                    golds.setdefault(prompt_key(row.tokens), []).append(gold)
    return golds


def prompt_key(prompt: np.ndarray) -> bytes:
    """The key under which a prompt's golds are stored."""
    return np.ascontiguousarray(prompt, "<i4").tobytes()


def gold_of(name: str, record: Mapping[str, Any]) -> Gold | None:
    """The gold of a benchmark item, or of a row's key ``gold``; None if there is none.

    Args:
      name: name of the format.
      record: one item.
    """
    if name not in BENCHMARK_KEYS:
        gold = record.get("gold")
        return Gold(str(gold)) if isinstance(gold, str | int | float) and str(gold) else None
    if name == "gsm8k":
        _, mark, answer = str(record.get("answer", "")).rpartition("####")
        return Gold(answer.strip()) if mark and answer.strip() else None
    if name == "bbh":
        target = record.get("target")
        return Gold(target.strip().strip("()")) if isinstance(target, str) else None
    if name == "mt_bench":
        return None
    try:
        choices = benchmark_item(name, record).choices
    except RowProblem:
        return None
    label = next((record[k] for k in _LABEL_KEYS if record.get(k) is not None), None)
    if name == "agieval" and not choices:
        return Gold(label.strip()) if isinstance(label, str) and label.strip() else None
    labels = _labels(label, choices, by_place=name == "mmlu" or "query" in record)
    return Gold(labels, choices) if labels else None


def _labels(given: Any, choices: tuple[tuple[str, str], ...], *, by_place: bool) -> str:
    """The right labels in the order of the choices, "B" or "ACD"; "" if unknown.

    AGIEval writes them as "B", "ACD", "A C" or a list; public copies as indices from 0.
    """
    known = [label for label, _ in choices]
    places = given if isinstance(given, list) else [given]
    if by_place and places and all(str(place).isdigit() for place in places):
        places = sorted({int(place) for place in places})
        return "".join(known[place] for place in places) if places[-1] < len(known) else ""
    said = [given] if str(given) in known else given
    parts = said if isinstance(said, list) else re.sub(r"[\s,;]", "", str(given or ""))
    labels = {str(part).strip() for part in parts}
    return "".join(sorted(labels, key=known.index)) if labels <= set(known) else ""


def is_correct(answer: str, gold: Gold) -> bool:
    """Whether the final answer in a text is the gold one.

    The final answer is the text after the last "-->", "####", "answer is" or "answer:". Without
    such a mark it is the last number, the last bracketed label of a choice (or the whole text, if
    that is a label or a choice), or the last words.
    """
    marks = list(_MARKS.finditer(answer))
    tail = answer[marks[-1].end() :] if marks else answer
    if gold.choices:
        return _chosen(tail, gold, marked=bool(marks)) == gold.text
    wanted = _as_number(gold.text)
    if wanted is not None:
        numbers = _NUMBER.findall(tail)
        return bool(numbers) and _as_number(numbers[0 if marks else -1]) == wanted
    said, true = normalised_words(tail), normalised_words(gold.text)
    return said == true if marks else bool(true) and said[-len(true) :] == true


def _chosen(tail: str, gold: Gold, *, marked: bool) -> str | None:
    """The label of the choice that a text selects."""
    labels = {label for label, _ in gold.choices}
    whole = normalised_words(tail)
    by_text = [label for label, text in gold.choices if normalised_words(text) == whole]
    if len(by_text) == 1:
        return by_text[0]
    if not marked:
        bracketed = [label for label in _BRACKETED.findall(tail) if label in labels]
        alone = tail.strip().strip("().:")
        return bracketed[-1] if bracketed else alone if alone in labels else None
    found = [first or second for first, second in _LABEL.findall(tail)]
    return next((label for label in found if label in labels), None)


def _as_number(text: str) -> float | None:
    plain = text.strip().strip("$%").replace(",", "")
    try:
        return float(plain)
    except ValueError:
        return None


def _rows_with_gold(
    name: str, record: Mapping[str, Any], origin: str, source: SourceConfig
) -> Iterator[tuple[TextRow, Gold]]:
    gold = gold_of(name, record)
    if gold is None or name == "text":
        return
    try:
        if name in BENCHMARK_KEYS:
            conversations = benchmark_conversations(name, record, origin, None, True)
        else:
            conversations = conversations_of(name, record, source, True)
        for turns in conversations:
            for found in expand_turns(turns, keep="last", prompts_only=True):
                yield TextRow(found.messages, None, origin, tools=found.tools), gold
    except RowProblem:
        return
