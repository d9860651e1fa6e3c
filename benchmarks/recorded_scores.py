"""Compares our answer extraction on public generations with the recorded results of their authors.

    python -m benchmarks.recorded_scores --assets ASSETS [--write docs/extraction.md]

``ASSETS/eval/model_outputs`` holds files as published. gpt-3.5-turbo on GSM8K and CommonsenseQA has
an answer and a score for each sample (github.com/Tebmer/Rereading-LLM-Reasoning). code-davinci-002
on BIG-Bench Hard (github.com/suzgunmirac/BIG-Bench-Hard) has a recorded score: the share of texts
that end in "the answer is <target>.", which equals the published accuracy.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from proxykd_jax.tasks.extraction import EXTRACTION_VERSION, extract, is_right
from proxykd_jax.tasks.items import Item, item_of

COMMA = "the recorded number stops at a comma"
MINUS = "the record ignores a minus sign"
SEVERAL = "the text gives several choices; the record takes one"
NOTHING = "the text names no choice; the record takes the most similar one"
FIRST = "no answer is marked; the record takes the first number of the last sentence"
REFUSED = "the text says that it cannot tell; the record takes a number from its last sentence"
FRACTION = "the record ignores a fraction in a box"
NO_BRACKETS = "the answer is a word, not brackets, as in the record"
OTHER = "unexplained"


@dataclass(frozen=True)
class Sample:
    """A generation with its record.

    Attributes:
      item: the question.
      output: the text of the generation.
      recorded: the answer that its authors extracted, if they did.
      right: whether they counted it as right.
    """

    item: Item
    output: str
    recorded: str | None
    right: bool


@dataclass(frozen=True)
class Difference:
    """A sample whose recorded answer or score differs from ours.

    Attributes:
      sample: the sample.
      extracted: our answer.
      right: whether we count it as right.
      cause: the reason for the difference.
    """

    sample: Sample
    extracted: str | None
    right: bool
    cause: str


def read_samples(path: Path) -> dict[str, list[Sample]]:
    """Reads the samples of a file by prompting method ("" if there is only one)."""
    if path.suffix == ".json":
        return {"": list(_bbh(path))}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {way: [_sample(row, way) for row in rows] for way in ("vanilla", "cot")}


def _bbh(path: Path) -> Iterator[Sample]:
    subtask = path.stem.partition("cot_")[2]
    outputs = json.loads(path.read_text(encoding="utf-8"))["outputs"]
    for number, row in enumerate(outputs, 1):
        question = row["input"].rpartition("\nQ: ")[2].rpartition("\nA:")[0]
        record = {"input": question, "target": row["target"]}
        item = item_of("bbh", record, subtask, str(number))
        assert item is not None
        _, mark, said = row["prediction"].rpartition("the answer is ")
        recorded = said.rstrip().removesuffix(".") if mark else None
        yield Sample(item, row["prediction"], recorded, recorded == row["target"])


def _sample(row: dict[str, Any], way: str) -> Sample:
    if "input" in row:
        record = {"question": row["input"], "answer": f"#### {row['target']}"}
        item = item_of("gsm8k", record, "", str(row["id"]))
    else:
        item = item_of("csqa", row, "", str(row["id"]))
    assert item is not None
    found = row[way]
    output = (found["generation"] or [""])[0]
    recorded = None if found["answer"] is None else str(found["answer"])
    return Sample(item, output, recorded, bool(found["score"]))


def differences(samples: list[Sample]) -> list[Difference]:
    """The samples whose score or extracted answer differs from the record."""
    found = []
    for sample in samples:
        extracted = extract(sample.item, sample.output)
        right = is_right(sample.item, extracted)
        if right != sample.right or not _same(sample, extracted):
            cause = _cause(sample, extracted)
            found.append(Difference(sample, extracted, right, cause))
    return found


def _same(sample: Sample, extracted: str | None) -> bool:
    if sample.recorded is None or extracted is None:
        return sample.recorded is None and extracted is None
    if sample.item.kind == "number":
        return _number(sample.recorded) == Fraction(extracted)
    recorded = sample.recorded if sample.item.kind == "brackets" else sample.recorded.strip("()")
    return recorded.lower() == extracted.lower()


def _number(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def _cause(sample: Sample, extracted: str | None) -> str:
    if extracted is None:
        named = {"choice": NOTHING, "number": REFUSED, "brackets": NO_BRACKETS}
        return named.get(sample.item.kind, OTHER)
    if sample.item.kind == "choice":
        return SEVERAL if len(extracted) > 1 else OTHER
    if sample.item.kind != "number" or sample.recorded is None:
        return OTHER
    ours, recorded = Fraction(extracted), _number(sample.recorded)
    if f"{extracted[:-3]},{extracted[-3:]}" in sample.output and recorded == ours // 1000:
        return COMMA
    if ours < 0:
        return MINUS
    if "/" in extracted:
        return FRACTION
    if "boxed" not in sample.output:
        return FIRST
    return OTHER


def report(folder: Path) -> str:
    """The text of the page: accuracies by file, differences by cause, and every difference."""
    lines = [_HEAD.format(version=EXTRACTION_VERSION)]
    table = [
        "| file | prompting | n | recorded | ours | ours - recorded, points |",
        "|---|---|---|---|---|---|",
    ]
    causes: Counter[tuple[str, str, str]] = Counter()
    listed = [
        "| file, prompting, id | gold | recorded | ours | scored | cause |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(folder.iterdir()):
        for way, samples in read_samples(path).items():
            found = differences(samples)
            name, size = short_name(path), len(samples)
            recorded = sum(sample.right for sample in samples)
            ours = recorded + sum(int(each.right) - int(each.sample.right) for each in found)
            table.append(
                f"| {name} | {way or '-'} | {size} | {100 * recorded / size:.2f} | "
                f"{100 * ours / size:.2f} | {100 * (ours - recorded) / size:+.2f} |"
            )
            for each in found:
                change = {1: "wrong -> right", -1: "right -> wrong", 0: "as recorded"}[
                    int(each.right) - int(each.sample.right)
                ]
                causes[each.cause, name, change] += 1
                sample = each.sample
                listed.append(
                    f"| {name}{', ' + way if way else ''}, {sample.item.id} | {sample.item.gold} | "
                    f"{sample.recorded} | {each.extracted} | {change} | {each.cause} |"
                )
    counts = ["| cause | file | score | samples |", "|---|---|---|---|"]
    counts += [f"| {c} | {n} | {s} | {k} |" for (c, n, s), k in sorted(causes.items())]
    lines += [*table, "", "### Differences by cause", "", *counts]
    lines += [
        "",
        "### Every difference",
        "",
        "The samples whose score or answer differs from the record.",
        "",
    ]
    return "\n".join(lines + listed) + "\n"


def short_name(path: Path) -> str:
    """The name of a file in the tables."""
    if path.suffix == ".json":
        return "bbh " + path.stem.partition("cot_")[2]
    return path.name.partition("_")[0]


_TITLE = "## Comparison with recorded scores"
_HEAD = (
    _TITLE
    + """

Version {version} of the extraction, compared with what the authors of public generations recorded.
The extraction does not know the file, the model or the gold answer. This command writes the rest of
the page:

    python -m benchmarks.recorded_scores --assets ASSETS --write docs/extraction.md

The module's docstring describes the files. The recorded score of the BBH files is the published
one: exact match of the text after "the answer is".

"""
)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--assets", type=Path, required=True, help="folder that holds eval/model_outputs"
    )
    parser.add_argument(
        "--write", type=Path, help="the page whose end to write (default: print it)"
    )
    arguments = parser.parse_args()
    page = report(arguments.assets / "eval" / "model_outputs")
    if arguments.write is None:
        print(page)
    else:
        rules = arguments.write.read_text(encoding="utf-8").partition(_TITLE)[0]
        arguments.write.write_text(rules + page, encoding="utf-8")


if __name__ == "__main__":
    main()
