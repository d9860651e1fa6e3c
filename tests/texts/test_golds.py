"""Gold answers of benchmark items and other rows, and whether a text agrees with one."""

from __future__ import annotations

from typing import Any

import pytest

from proxykd_jax.texts.golds import Gold, gold_of, is_correct

CHOICES = (("A", "a dog"), ("B", "the sun"), ("C", "water"))
LISTED = {"label": ["A", "B", "C"], "text": ["a dog", "the sun", "water"]}


@pytest.mark.parametrize(
    "name, record, gold",
    [
        ("gsm8k", {"question": "q", "answer": "2+2=4\n#### 1,004"}, Gold("1,004")),
        ("gsm8k", {"question": "q", "answer": "no mark"}, None),
        ("arc", {"question": "q", "choices": LISTED, "answerKey": "B"}, Gold("B", CHOICES)),
        (
            "csqa",
            {
                "question": {
                    "stem": "q",
                    "question_concept": "x",
                    "choices": [{"label": k, "text": v} for k, v in CHOICES],
                },
                "answerKey": "C",
            },
            Gold("C", CHOICES),
        ),
        ("csqa", {"question": "q", "choices": LISTED, "answerKey": ""}, None),
        (
            "mmlu",
            {"question": "q", "choices": [text for _, text in CHOICES], "answer": 2},
            Gold("C", CHOICES),
        ),
        ("bbh", {"input": "q", "target": "(B)"}, Gold("B")),
        ("mt_bench", {"question_id": 1, "turns": ["q"]}, None),
        ("prompt_response", {"prompt": "q", "response": "r", "gold": 7}, Gold("7")),
        ("prompt_response", {"prompt": "q", "response": "r"}, None),
    ],
)
def test_the_gold_of_an_item(name: str, record: dict[str, Any], gold: Gold | None):
    assert gold_of(name, record) == gold


@pytest.mark.parametrize(
    "answer, gold, correct",
    [
        ("3 + 4 = 7. So 7 apples, worth 1,004 dollars.", Gold("1004"), True),
        ("1004 at first, then 12.", Gold("1004"), False),
        ("The answer is 1004, not 12.", Gold("1,004"), True),
        ("#### 12 or 1004", Gold("1004"), False),
        ("about $3.50", Gold("3.5"), True),
        ("-5", Gold("5"), False),
        ("x7", Gold("7"), False),
        ("Stars shine, so the answer is (B).", Gold("B", CHOICES), True),
        ("Not (A): the answer is B", Gold("B", CHOICES), True),
        ("(A) bites, (B) shines", Gold("A", CHOICES), False),
        ("B", Gold("B", CHOICES), True),
        ("B.", Gold("B", CHOICES), True),
        ("A dog barks", Gold("A", CHOICES), False),
        ("It is hot --> the sun", Gold("B", CHOICES), True),
        ("It is hot --> water", Gold("B", CHOICES), False),
        ("So it is Not Valid.", Gold("not valid"), True),
        ("The answer is valid", Gold("not valid"), False),
        ("The answer is not valid", Gold("valid"), False),
        ("", Gold("valid"), False),
    ],
)
def test_when_an_answer_is_the_gold_one(answer: str, gold: Gold, correct: bool):
    assert is_correct(answer, gold) == correct
