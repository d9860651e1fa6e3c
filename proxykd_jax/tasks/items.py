"""The six benchmarks: items with gold answers, from official files, public copies and the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from proxykd_jax.config.schema import BenchmarksConfig
from proxykd_jax.errors import UserError
from proxykd_jax.tasks.numbers import canonical
from proxykd_jax.tasks.words import pair_of
from proxykd_jax.texts.benchmark_files import (
    BENCHMARK_KEYS,
    benchmark_examples,
    benchmark_format,
    benchmark_item,
    item_id,
)
from proxykd_jax.texts.columnar_files import dataset_subsets, read_dataset
from proxykd_jax.texts.files import list_files, read_file
from proxykd_jax.texts.golds import gold_of
from proxykd_jax.texts.normalise import normalised_words
from proxykd_jax.texts.records import RowProblem

TASKS = ("agieval", "arc", "bbh", "csqa", "gsm8k", "mmlu")
Kind = Literal["number", "choice", "maths", "true", "yes", "valid", "brackets", "words"]

_OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(.*)$", re.MULTILINE)
# "abstract_algebra_test.csv" belongs to the subject abstract_algebra.
_PART = re.compile(r"[_-](?:test|dev|val|validation|train|rand_split)$")
_HUB = re.compile(r"hub:([^#]+)#(?:([^/#]+)/)?([^/#]+)")
_MOST_PROBLEMS = 0.1


class Item(NamedTuple):
    """One question of a benchmark with its gold answer.

    Attributes:
      task: one of ``TASKS``.
      subtask: the subject or sub-task; "" if the benchmark has none.
      id: its own id, or its file and line; unique within its task.
      question: the question with its passage, and its choices if the text contains them.
      choices: (label, text); empty for an open question.
      gold: the right labels ("B", "ACD"), a canonical number, a word, LaTeX, brackets or words.
      kind: the kind of answer.
      several: items of this sub-task may have several right choices.
    """

    task: str
    subtask: str
    id: str
    question: str
    choices: tuple[tuple[str, str], ...]
    gold: str
    kind: Kind
    several: bool = False


class Questions(NamedTuple):
    """What a benchmark's files hold.

    Attributes:
      items: the questions, in the files' order.
      unusable: the rows that are no item, each as "place: reason".
    """

    items: list[Item]
    unusable: list[str]


def read_items(task: str, path: str, limit: int | None = None) -> Questions:
    """The items of a benchmark's files, and the rows that cannot be used.

    Args:
      task: one of ``TASKS``.
      path: file, folder or glob, in official form or a public copy; or a dataset as in
        ``hub_place``.
      limit: most items per sub-task.

    Raises:
      UserError: there are no files, or one is damaged, of another benchmark or without golds.
    """
    items: list[Item] = []
    unusable: list[str] = []
    for part, records in _parts(path):
        found = list(_items_of(task, part, records, limit, unusable))
        several = {item.subtask for item in found if _has_several(item)}
        items += [item._replace(several=item.subtask in several) for item in found]
    return Questions(_numbered(items), unusable)


def files_of(settings: BenchmarksConfig, tasks: Sequence[str], where: str) -> dict[str, str]:
    """The files of the named tasks, or of all tasks if none is named.

    Args:
      settings: with the files.
      tasks: some of the configured tasks.
      where: the place that names them, for the message.

    Raises:
      UserError: a task has no files.
    """
    unknown = [task for task in tasks if task not in settings.paths]
    if unknown:
        raise UserError(
            f"{where}: no files of {', '.join(unknown)} are named under evaluate.benchmarks, which "
            f"has {', '.join(settings.paths)}."
        )
    return {task: path for task, path in settings.paths.items() if task in tasks or not tasks}


def hub_place(text: str) -> tuple[str, str | None, str] | None:
    """(dataset, subset, split) of ``hub:NAME#SPLIT`` or ``hub:NAME#SUBSET/SPLIT``.

    NAME is a dataset of the Hugging Face hub or a local folder of the same form. The subset ``*``
    stands for all subsets. None for a text that does not start with ``hub:``.

    Raises:
      UserError: it starts with ``hub:`` but has neither form.
    """
    if not text.startswith("hub:"):
        return None
    found = _HUB.fullmatch(text)
    if found is None:
        raise UserError(
            f"evaluate.benchmarks: {text} must be hub:NAME#SPLIT or hub:NAME#SUBSET/SPLIT, such as "
            "hub:openai/gsm8k#main/test."
        )
    return found[1], found[2], found[3]


def _has_several(item: Item) -> bool:
    """Whether several choices are right; a gold that names no choice, as in some BBH rows, is one.

    Such a gold ("Monsters, Inc" where the choices are "Monsters" and "Inc") cannot be reached.
    """
    return len(item.gold) > 1 and set(item.gold) <= {label for label, _ in item.choices}


def _parts(path: str) -> Iterator[tuple[str, Iterator[tuple[Mapping[str, Any], str]]]]:
    """(name, records with origins) of each file or subset; the name determines the sub-task."""
    place = hub_place(path)
    if place is None:
        for file in list_files(path):
            yield file.name.split(".")[0], read_file(file)
        return
    name, subset, split = place
    for one in dataset_subsets(name) if subset == "*" else [subset]:
        yield one or Path(name).name, read_dataset(name, split, one)


def item_of(task: str, record: Mapping[str, Any], subtask: str, identity: str) -> Item | None:
    """The item of a record; None if it has no gold.

    Raises:
      RowProblem: the record is damaged.
    """
    question, choices = benchmark_item(task, record)
    gold = gold_of(task, record)
    if gold is None:
        return None
    text = gold.text
    if task == "bbh":
        text = str(record["target"]).strip()
        choices = _options(question)
        if choices:
            text = _label_of(text, choices)
    kind = _kind(task, text, choices)
    if kind == "number":
        text = canonical(text) or text
    elif kind in ("true", "yes", "valid"):
        text = text.lower()
    return Item(task, subtask, identity, question, choices, text, kind)


def _items_of(
    task: str,
    part: str,
    records: Iterator[tuple[Mapping[str, Any], str]],
    limit: int | None,
    unusable: list[str],
) -> Iterator[Item]:
    """The items of one file; places and reasons of other rows are added to ``unusable``."""
    counts: dict[str, int] = {}
    seen, problems = 0, []
    for record, origin in records:
        if not seen and benchmark_format(record) != task:
            raise UserError(
                f"evaluate.benchmarks: {origin} is not of {task}, whose form is "
                f"{BENCHMARK_KEYS[task]}; it has the keys {', '.join(map(str, record))}."
            )
        for example, place in benchmark_examples(task, record, origin):
            seen += 1
            subtask = _subtask(task, part, example)
            if limit is not None and counts.get(subtask, 0) >= limit:
                continue
            problem = "no gold answer"
            try:
                own = example.get("id")
                identity = str(own) if isinstance(own, str | int) else item_id(place)
                item = item_of(task, example, subtask, identity)
            except RowProblem as found:
                item, problem = None, str(found)
            if item is None:
                problems.append(f"{place}: {problem}")
                continue
            counts[subtask] = counts.get(subtask, 0) + 1
            yield item
    if len(problems) > _MOST_PROBLEMS * seen:
        raise UserError(
            f"evaluate.benchmarks: {len(problems)} of {seen} questions of {part} have no gold "
            f"answer or are damaged ({problems[-1]}). Name the part of {task} with public answers."
        )
    unusable += problems


def _subtask(task: str, part: str, record: Mapping[str, Any]) -> str:
    if task in ("arc", "csqa", "gsm8k"):
        return ""
    for key in ("subject", "subtask", "task"):
        if isinstance(record.get(key), str):
            return str(record[key])
    return _PART.sub("", part)


def _numbered(items: list[Item]) -> list[Item]:
    """Makes ids unique within the task: repeated ones get the sub-task and a number."""
    seen: dict[str, int] = {}
    unique = []
    for item in items:
        count = seen[item.id] = seen.get(item.id, 0) + 1
        unique.append(item if count == 1 else item._replace(id=f"{item.id}~{count}"))
    return unique


def _options(question: str) -> tuple[tuple[str, str], ...]:
    """The lettered choices that a BBH question lists below "Options:"."""
    _, mark, listed = question.rpartition("Options:")
    return tuple((label, text.strip()) for label, text in _OPTION.findall(listed)) if mark else ()


def _label_of(target: str, choices: tuple[tuple[str, str], ...]) -> str:
    """The label of a target: "(B)", or that of the choice which a target without letter repeats."""
    bare = target.strip("() ")
    if any(bare == label for label, _ in choices):
        return bare
    words = normalised_words(target)
    equal = [label for label, text in choices if normalised_words(text) == words]
    return equal[0] if equal else target


def _kind(task: str, gold: str, choices: tuple[tuple[str, str], ...]) -> Kind:
    if choices:
        return "choice"
    if task == "agieval":
        return "maths"
    if task == "gsm8k":
        return "number"
    pair = pair_of(gold)
    if pair is not None:
        kinds: dict[str, Kind] = {"true": "true", "yes": "yes", "valid": "valid"}
        return kinds[pair[0]]
    if re.fullmatch(r"[()\[\]{}<>\s]+", gold):
        return "brackets"
    return "number" if re.fullmatch(r"[-+]?[\d,]+(?:\.\d+)?", gold) else "words"
