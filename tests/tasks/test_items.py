"""Items of the six benchmarks with their gold answers, from official files and re-dumps."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.tasks.coverage import coverage, described_coverage
from proxykd_jax.tasks.extraction import extract, is_right
from proxykd_jax.tasks.items import Questions, read_items
from proxykd_jax.tasks.prompts import prompt_of

ASSETS = Path(os.environ.get("PROXYKD_ASSETS", "../shared/assets"))
real_files = pytest.mark.skipif(
    not (ASSETS / "eval").is_dir(), reason=f"needs the public files in {ASSETS}/eval"
)

TEXTS = ["oxygen", "carbon dioxide", "neon"]
LISTED = [{"text": text, "label": label} for text, label in zip(TEXTS, "ABC", strict=True)]
NUMBERED = [{"text": text, "label": label} for text, label in zip(TEXTS, "123", strict=True)]
STEM = "Which gas do plants take in?"
OPTIONS = ["(A)oxygen", "(B)carbon dioxide", "(C)neon"]


def write(folder: Path, name: str, *records: dict[str, Any]) -> str:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


FORMS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "gsm8k": ("gsm8k", {"question": "q", "answer": "1+1=2\n#### 2"}, "number", "2"),
    "gsm8k_comma": ("gsm8k", {"question": "q", "answer": "#### 1,050"}, "number", "1050"),
    "gsm8k_minus": ("gsm8k", {"question": "q", "answer": "#### -10"}, "number", "-10"),
    "arc": ("arc", {"id": "x", "question": {"stem": STEM, "choices": LISTED}, "answerKey": "B"},
            "choice", "B"),
    "arc_numbers": ("arc", {"question": {"stem": STEM, "choices": NUMBERED}, "answerKey": "2"},
                    "choice", "2"),
    "arc_hub": ("arc", {"question": STEM, "choices": {"text": TEXTS, "label": ["A", "B", "C"]},
                        "answerKey": "B"}, "choice", "B"),
    "csqa": ("csqa", {"question": {"stem": STEM, "question_concept": "x", "choices": LISTED},
                      "answerKey": "C"}, "choice", "C"),
    "csqa_hub": ("csqa", {"question": STEM, "question_concept": "x", "answerKey": "A",
                          "choices": {"text": TEXTS, "label": ["A", "B", "C"]}}, "choice", "A"),
    "mmlu_hub": ("mmlu", {"question": STEM, "choices": TEXTS, "answer": 1, "subject": "s"},
                 "choice", "B"),
    "agieval": ("agieval", {"passage": None, "question": STEM, "options": OPTIONS, "label": "B",
                            "answer": None}, "choice", "B"),
    "agieval_joined": ("agieval", {"question": STEM, "options": OPTIONS, "label": "AC"},
                       "choice", "AC"),
    "agieval_spaced": ("agieval", {"question": STEM, "options": OPTIONS, "label": "C A"},
                       "choice", "AC"),
    "agieval_list": ("agieval", {"passage": "P.", "question": STEM, "options": OPTIONS,
                                 "label": ["C", "B"]}, "choice", "BC"),
    "agieval_maths": ("agieval", {"passage": None, "question": "What is $x$?", "options": None,
                                  "label": None, "answer": "\\frac{1}{2}"}, "maths",
                      "\\frac{1}{2}"),
    "agieval_hub": ("agieval", {"query": STEM, "choices": OPTIONS, "gold": [1]}, "choice", "B"),
    "bbh_rows": ("bbh", {"input": "not True is", "target": "False"}, "true", "false"),
    "bbh_yes": ("bbh", {"input": "Is it?\nOptions:\n- Yes\n- No", "target": "No"}, "yes", "no"),
    "bbh_valid": ("bbh", {"input": "Is it?", "target": "invalid"}, "valid", "invalid"),
    "bbh_number": ("bbh", {"input": "1 - 2 =", "target": "-1"}, "number", "-1"),
    "bbh_brackets": ("bbh", {"input": "Input: [ (", "target": ") ]"}, "brackets", ") ]"),
    "bbh_words": ("bbh", {"input": "List: b a", "target": "a b"}, "words", "a b"),
    "bbh_choice": ("bbh", {"input": "W?\nOptions:\n(A) x\n(B) y", "target": "(B)"}, "choice", "B"),
    "bbh_letterless": ("bbh", {"input": "W?\nOptions:\n(A) x, z\n(B) y", "target": "x, z"},
                       "choice", "A"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_form_and_its_gold(tmp_path: Path, form: str):
    task, record, kind, gold = FORMS[form]
    (item,) = read_items(task, write(tmp_path, "some_test.jsonl", record)).items
    assert (item.task, item.kind, item.gold) == (task, kind, gold)
    assert item.id == str(record.get("id", "some_test-1"))
    assert item.subtask == (
        "" if task in ("arc", "csqa", "gsm8k") else record.get("subject", "some")
    )
    assert item.several == (kind == "choice" and len(gold) > 1)
    assert is_right(item, extract(item, f"So the answer is {gold}."))


def test_a_passage_stands_before_the_question(tmp_path: Path):
    _, record, _, _ = FORMS["agieval_list"]
    (item,) = read_items("agieval", write(tmp_path, "law.jsonl", record)).items
    assert item.question == f"P.\n\n{STEM}" and len(item.choices) == 3


def test_mmlu_with_and_without_a_header(tmp_path: Path):
    rows = [["1, 2?", "0", "1", "2", "3"], ['A "b"', "x", "y", "z", "w"]]
    for name, header, answers in (
        ("astronomy_test.csv", [], ["C", "A"]),
        ("re_dump.csv", [["question", "choice0", "choice1", "choice2", "choice3", "answer"]],
         ["2", "0"]),
    ):  # fmt: skip
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows(
                header + [[*row, answer] for row, answer in zip(rows, answers, strict=True)]
            )
        items = read_items("mmlu", str(tmp_path / name)).items
        assert [item.gold for item in items] == ["C", "A"]
        assert items[0].question == "1, 2?" and items[0].choices[2] == ("C", "2")
        assert items[0].subtask == name.removesuffix("_test.csv").removesuffix(".csv")


def test_all_of_a_bbh_file_and_a_limit_of_each_sub_task(tmp_path: Path):
    for name, targets in (("navigate", ["Yes", "No", "Yes"]), ("counting", ["3", "4", "5"])):
        examples = [{"input": f"{name} {n}", "target": t} for n, t in enumerate(targets)]
        (tmp_path / f"{name}.json").write_text(json.dumps({"canary": "c", "examples": examples}))
    items = read_items("bbh", str(tmp_path)).items
    assert Counter(item.subtask for item in items) == {"navigate": 3, "counting": 3}
    assert len({item.id for item in items}) == 6
    few = read_items("bbh", str(tmp_path), limit=2).items
    assert Counter(item.subtask for item in few) == {"navigate": 2, "counting": 2}
    assert few == [item for item in items if item in few]


def test_ids_are_unique(tmp_path: Path):
    record = {**FORMS["arc"][1], "id": "same"}
    items = read_items("arc", write(tmp_path, "a.jsonl", record, record)).items
    assert [item.id for item in items] == ["same", "same~2"]


def test_a_gold_without_a_letter_changes_no_prompt_and_is_named(tmp_path: Path):
    options = "Which?\nOptions:\n(A) salt\n(B) pepper\n(C) oil"
    plain = [{"input": f"{n} {options}", "target": "(B)"} for n in range(3)]
    odd = {"input": options, "target": "salt, pepper"}
    path = write(tmp_path, "spices.json", *plain, odd)
    questions = read_items("bbh", path)
    assert not any(item.several for item in questions.items)
    alone = read_items("bbh", write(tmp_path, "alone.json", *plain)).items
    assert [prompt_of(item) for item in questions.items[:3]] == [prompt_of(i) for i in alone]
    found = coverage(questions)
    assert found == {"items": 4, "unusable": [], "unreachable": {"spices-4": "salt, pepper"}}
    (line,) = described_coverage("bbh", found)
    assert "1 of 4 items" in line and "spices-4 (gold salt, pepper)" in line


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"question": f"q{n}", "answer": f"#### {n}"} for n in range(20)]
    rows[3] = {"question": "q3", "answer": "no gold here ####"}
    rows[7] = {"question": "", "answer": "#### 7"}
    questions = read_items("gsm8k", write(tmp_path, "some.jsonl", *rows))
    assert len(questions.items) == 18
    places = [line.split("some.jsonl")[1] for line in questions.unusable]
    assert places == [":4: no gold answer", ":8: empty prompt"]
    (line,) = described_coverage("gsm8k", coverage(questions))
    assert "2 of 20 rows" in line and ":4: no gold answer" in line and ":8: empty" in line
    many = coverage(questions) | {"unusable": [f"f:{n}: empty" for n in range(30)]}
    assert "f:9: empty; and 20 more" in described_coverage("gsm8k", many)[0]


def test_what_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read_items("arc", str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="is not of arc"):
        read_items("arc", write(tmp_path, "g.jsonl", FORMS["gsm8k"][1]))
    hidden = {**FORMS["csqa"][1], "answerKey": ""}
    with pytest.raises(UserError, match=r"1 of 1 questions .* no gold"):
        read_items("csqa", write(tmp_path, "test.jsonl", hidden))


@real_files
@pytest.mark.parametrize(
    "task, path, count, kinds, subtasks",
    [
        ("gsm8k", "gsm8k/test.jsonl", 660, {"number": 660}, 1),
        ("arc", "arc_challenge/ARC-Challenge-Dev.jsonl", 294, {"choice": 294}, 1),
        ("arc", "arc_challenge/hf_layout_test.jsonl", 586, {"choice": 586}, 1),
        ("csqa", "csqa/dev_rand_split.jsonl", 611, {"choice": 611}, 1),
        ("mmlu", "mmlu_header_variant", 100, {"choice": 100}, 1),
        ("mmlu", "mmlu/dev", 285, {"choice": 285}, 57),
        ("agieval", "agieval", 4240, {"choice": 3122, "maths": 1118}, 10),
        ("bbh", "bbh", 3500, {"choice": 2000, "number": 500, "true": 250, "brackets": 250,
                              "yes": 250, "words": 250}, 14),
    ],
)  # fmt: skip
def test_the_official_files(task: str, path: str, count: int, kinds: dict[str, int], subtasks: int):
    items = read_items(task, str(ASSETS / "eval" / path)).items
    assert len(items) == count == len({item.id for item in items})
    assert Counter(item.kind for item in items) == kinds
    assert len({item.subtask for item in items}) == subtasks
    assert not coverage(Questions(items, []))["unreachable"]
    for item in items:
        if item.kind == "choice":
            labels = [label for label, _ in item.choices]
            assert item.gold and set(item.gold) <= set(labels)


@real_files
def test_both_layouts_of_a_subject_give_the_same_items():
    official = read_items("mmlu", str(ASSETS / "eval/mmlu/test/abstract_algebra_test.csv")).items
    dumped = read_items(
        "mmlu", str(ASSETS / "eval/mmlu_header_variant/abstract_algebra_test.csv")
    ).items
    assert [item[3:] for item in official] == [item[3:] for item in dumped]
