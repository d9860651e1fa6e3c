"""Benchmark files: their questions, the prompts made of them, and the answers to these.

Each benchmark is read in its official form and in the layout of its public copy. Gold answers are
never taken as a teacher's answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from proxykd_jax.texts.answers import Answers
from proxykd_jax.texts.conversations import RawTurn, checked_text
from proxykd_jax.texts.normalise import normalised_words
from proxykd_jax.texts.records import RowProblem
from proxykd_jax.texts.row_keys import COMMON, unread_keys

Record = Mapping[str, Any]

BENCHMARK_KEYS = {
    "gsm8k": "question, answer (with ####)",
    "arc": "question {stem, choices} or question and choices {text, label}",
    "csqa": "question {stem, question_concept, choices} or question, question_concept, choices",
    "mmlu": "CSV of question, four choices, answer, or question and choices [..]",
    "agieval": "passage, question, options, label, or query, choices [..] and gold [..]",
    "bbh": "examples [{input, target}]",
    "mt_bench": "question_id, turns [..]",
}
_READS: dict[str, frozenset[str]] = {
    "gsm8k": frozenset(("question", "answer")),
    "arc": frozenset(("question", "choices", "answerKey")),
    "csqa": frozenset(("question", "question_concept", "choices", "answerKey")),
    "mmlu": frozenset(("question", "choices", "answer")),
    "agieval": frozenset(
        ("passage", "question", "options", "label", "answer", "query", "choices", "gold", "other")
    ),
    "bbh": frozenset(("input", "target")),
    "mt_bench": frozenset(("turns", "reference")),
}
_LETTERS = "ABCDEFGHIJ"
_LABELLED = re.compile(r"\(([A-Z0-9])\)\s*(.*)", re.DOTALL)
# A question with fewer words is also searched together with its choices: alone it is too general.
_TELLING_WORDS = 13


class Question(NamedTuple):
    """One item of a benchmark.

    Attributes:
      question: the question, with its passage before it.
      choices: (label, text), empty for an open question.
    """

    question: str
    choices: tuple[tuple[str, str], ...] = ()

    @property
    def prompt(self) -> str:
        """The question, then its labelled choices, one per line."""
        if not self.choices:
            return self.question
        listed = "\n".join(f"{label}. {text}" for label, text in self.choices)
        return f"{self.question}\n\n{listed}"


def benchmark_format(record: Record) -> str | None:
    """The benchmark whose form the record has, or None."""
    question = record.get("question")
    if isinstance(question, Mapping) and {"stem", "choices"} <= question.keys():
        return "csqa" if "question_concept" in question else "arc"
    if isinstance(record.get("examples"), list) or record.keys() == {"input", "target"}:
        return "bbh"
    if "question_id" in record and isinstance(record.get("turns"), list):
        return "mt_bench"
    if {"query", "choices", "gold"} <= record.keys():
        return "agieval"
    if not isinstance(question, str):
        return None
    if "options" in record and "label" in record:
        return "agieval"
    choices = record.get("choices")
    if isinstance(choices, Mapping):
        return "csqa" if "question_concept" in record else "arc"
    if isinstance(choices, list) and "answer" in record:
        return "mmlu"
    answer = record.get("answer")
    return "gsm8k" if isinstance(answer, str) and "####" in answer else None


def benchmark_examples(name: str, record: Record, origin: str) -> Iterator[tuple[Record, str]]:
    """The items of a record: BBH stores a whole task in one object; the others store one item."""
    if name == "bbh" and isinstance(record.get("examples"), list):
        for index, example in enumerate(record["examples"], 1):
            yield (example if isinstance(example, Mapping) else {}), f"{origin}[{index}]"
    else:
        yield record, origin


def benchmark_unread(name: str, record: Record) -> Iterator[tuple[str, str]]:
    """(key, example) of the keys of an item that hold text and are not read."""
    return unread_keys(record, _READS[name] | COMMON)


def benchmark_item(name: str, record: Record) -> Question:
    """The question of one item.

    Raises:
      RowProblem: a part of it is missing or is not text.
    """
    if name == "bbh":
        return Question(checked_text(record.get("input"), "empty prompt"))
    question: Any = record.get("question")
    if name == "gsm8k":
        return Question(checked_text(question, "empty prompt"))
    if name == "mmlu":
        return Question(
            checked_text(question, "empty prompt"),
            _choices(_LETTERS, record.get("choices")),
        )
    if name == "agieval" and "query" in record:
        text = checked_text(record.get("query"), "empty prompt")
        return Question(text, _agieval_choices(record.get("choices")))
    if name == "agieval":
        text = checked_text(question, "empty prompt")
        passage = record.get("passage")
        if isinstance(passage, str) and passage.strip():
            text = f"{passage}\n\n{text}"
        options = record.get("options")
        return Question(text, () if options is None else _agieval_choices(options))
    choices = record.get("choices")
    if isinstance(question, Mapping):
        question, choices = question.get("stem"), question.get("choices")
    text = checked_text(question, "empty prompt")
    if isinstance(choices, Mapping):
        return Question(text, _choices(choices.get("label"), choices.get("text")))
    if not isinstance(choices, list) or not all(isinstance(c, Mapping) for c in choices):
        raise RowProblem("question without its choices")
    return Question(
        text, _choices([c.get("label") for c in choices], [c.get("text") for c in choices])
    )


def _choices(labels: Any, texts: Any) -> tuple[tuple[str, str], ...]:
    if (
        not isinstance(texts, list)
        or not isinstance(labels, (list, str))
        or not 2 <= len(texts) <= len(labels)
    ):
        raise RowProblem("question without its choices")
    return tuple(
        # Public copies store some choices as numbers.
        (str(label), checked_text(None if text is None else str(text), "choice without text"))
        for label, text in zip(labels, texts, strict=False)
    )


def _agieval_choices(options: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
        raise RowProblem("question without its choices")
    found = [_LABELLED.fullmatch(option.strip()) for option in options]
    if all(found):
        return tuple((match[1], match[2]) for match in found if match)
    return _choices(_LETTERS, options)


def benchmark_conversations(
    name: str, record: Record, origin: str, answers: Answers | None, prompts_only: bool
) -> list[list[RawTurn]]:
    """The conversations of one item: its prompt, with each of the teacher's answers.

    An item's id is its own (``id``, ``question_id``), or ``<file name without ending>-<line>``,
    taken from its origin. An answer is found by id or by the prompt's text.

    Raises:
      RowProblem: the item is damaged or has no answer.
    """
    if name == "mt_bench":
        return _mt_bench(record, answers, prompts_only)
    prompt = benchmark_item(name, record).prompt
    if prompts_only or answers is None:
        return [[RawTurn("user", prompt)]]
    own = record.get("id")
    found = answers.find(item_id(origin) if own is None else str(own), prompt)
    return [[RawTurn("user", prompt), answer] for answer in found]


def item_id(origin: str) -> str:
    """The id of an item without one: ``.../train.jsonl:12`` becomes ``train-12``."""
    path, _, line = origin.rpartition(":")
    return f"{Path(path).name.split('.')[0]}-{line}"


def mt_bench_turns(record: Record) -> list[str]:
    """The user's turns of a FastChat question.

    Raises:
      RowProblem: there are none, or one is not text.
    """
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns:
        raise RowProblem("empty prompt")
    return [checked_text(turn, "empty prompt") for turn in turns]


def _mt_bench(record: Record, answers: Answers | None, prompts_only: bool) -> list[list[RawTurn]]:
    turns = mt_bench_turns(record)
    if prompts_only or answers is None:
        # Later turns refer to an answer that does not exist here.
        return [[RawTurn("user", turns[0])]]
    conversations: list[list[RawTurn]] = []
    for answer in answers.find(str(record.get("question_id")), str(turns[0])):
        replies = answer.content
        listed: Sequence[Any] = replies if isinstance(replies, list) else [replies]
        if len(listed) > len(turns):
            raise RowProblem("more answers than questions")
        conversations.append(
            [
                RawTurn(role, text)
                for pair in zip(turns, listed, strict=False)
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
        )
    return conversations


class SoughtText(NamedTuple):
    """A text to search for in a corpus.

    Attributes:
      text: a question, or a question with its choices.
      whole_only: the text is so general that only a message equal to it counts.
    """

    text: str
    whole_only: bool


def sought_texts(question: Question) -> Iterator[SoughtText]:
    """A question; a short multiple-choice one ("Which is true?") also with its choices."""
    short = len(normalised_words(question.question)) < _TELLING_WORDS
    yield SoughtText(question.question, short and bool(question.choices))
    if short and question.choices:
        yield SoughtText(question.prompt, False)
