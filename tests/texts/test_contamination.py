"""Benchmark questions are found, and ordinary text is not mistaken for them."""

import json
import random

import pytest

from proxykd_jax.texts.benchmark_files import SoughtText
from proxykd_jax.texts.contamination import (
    BOILERPLATE_QUESTIONS,
    CONTAINED_WORDS,
    OVERLAP_WORDS,
    ContaminationIndex,
    contamination_report,
)
from proxykd_jax.texts.normalise import normalised_words
from proxykd_jax.texts.records import Message, TextRow

LONG = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four. How much does she make?"
)
MIDDLE = "What is the smallest prime number above 90?"  # 8 words
SHORT = "What is gravity?"


def row(text, origin="f:1"):
    return TextRow((Message("user", text), Message("assistant", LONG)), None, origin)


@pytest.fixture(scope="module")
def index():
    return ContaminationIndex([LONG, MIDDLE, SHORT])


def how(index, text):
    match = index.match(row(text))
    return match and match.how


def test_whole_questions_of_any_length(index):
    for text in (LONG, MIDDLE, SHORT, "  what IS\ngravity", LONG.upper().replace(".", " ;")):
        assert how(index, text) == "whole"


def test_contained_questions(index):
    assert how(index, f"Solve it step by step: {MIDDLE} Answer with a number.") == "contained"
    assert how(index, f"Question: {LONG}\nAnswer:") == "contained"


def test_a_short_question_inside_a_message_says_nothing(index):
    assert how(index, "What is gravity? And why do apples fall from trees to the ground?") is None


def test_overlap_of_thirteen_words(index):
    words = LONG.split()
    assert how(index, "He said: " + " ".join(words[3 : 3 + OVERLAP_WORDS]) + ".") == "overlap"
    assert how(index, "He said: " + " ".join(words[3 : 2 + OVERLAP_WORDS]) + ".") is None
    changed = LONG.replace("16 eggs", "20 eggs").replace("three", "two")
    assert how(index, changed) == "overlap"


def test_answers_are_not_looked_at(index):
    assert index.match(row("Tell me about ducks.")) is None


def test_every_user_turn_and_plain_texts_are(index):
    turns = (
        Message("system", LONG),
        Message("user", "Hello"),
        Message("assistant", "Hi"),
        Message("user", f"Now: {LONG}"),
    )
    match = index.match(TextRow(turns, None, "f:9"))
    assert match is not None and match.origin == "f:9" and match.question.startswith("Janet")
    assert index.match(TextRow(turns[:3], None, "f:9")) is None
    assert TextRow((), f"A story. {LONG} The end.", "f:2") in index


def test_boilerplate_of_the_benchmark_does_not_count():
    words = "the following paragraphs each describe a set of several objects arranged in order and"
    draw = random.Random(0)

    def questions(count):
        return [
            f"{words} {' '.join(f'word{draw.randrange(10**9)}' for _ in range(20))}"
            for _ in range(count)
        ]

    text = f"Explain this: {words} nothing else."
    assert how(ContaminationIndex(questions(BOILERPLATE_QUESTIONS)), text) == "overlap"
    many = questions(BOILERPLATE_QUESTIONS + 1)
    index = ContaminationIndex(many)
    assert how(index, text) is None
    assert all(how(index, f"So: {question}") == "contained" for question in many)
    # A question that occurs twice counts once.
    assert how(ContaminationIndex(questions(1) * 50), text) == "overlap"


def test_runs_of_letters_and_numbers_do_not_count():
    code = "for(int i = 0; i<3; ++i) { for(int j = 0; j<3; ++j) { draw((3i,j)); } }"
    index = ContaminationIndex([f"How many rectangles are in the array below? {code} Count them."])
    assert how(index, f"Fix my loop: {code}") is None


def test_general_questions_with_choices():
    """A general text such as "Which is true?" only counts together with its choices."""
    question = "Which one of the following statements is true:"
    prompt = f"{question}\n\nA. Plants breathe nitrogen\nB. Whales are mammals that live in water"
    index = ContaminationIndex([SoughtText(question, True), SoughtText(prompt, False)])
    assert len(question.split()) == CONTAINED_WORDS
    assert how(index, question) == "whole"
    assert how(index, f"{question} (A) cats fly (B) dogs bark") is None
    shown = prompt.replace("A.", "(a)").replace("B.", "(b)")
    assert how(index, f"Answer this. {shown} Thanks!") == "contained"


def test_han_letters_count_as_words():
    question = "下列关于此次反补贴调查的哪项判断是正确的"
    index = ContaminationIndex([question])
    assert len(normalised_words(question)) == len(question)
    assert how(index, f"请回答：{question}？谢谢") == "contained"
    assert how(index, "下列关于此次调查的判断") is None


def test_agrees_with_a_plain_search():
    """On random texts over few words, the result equals a search with Python's string methods."""
    draw = random.Random(0)
    vocabulary = [f"w{n:03d}" for n in range(12)]
    questions = [" ".join(draw.choices(vocabulary, k=draw.randrange(3, 25))) for _ in range(300)]
    index = ContaminationIndex(questions)
    count = {}
    for question in set(questions):
        words = question.split()
        for run in {tuple(words[i : i + 13]) for i in range(len(words) - 12)}:
            count[run] = count.get(run, 0) + 1
    seen = {"whole": 0, "contained": 0, "overlap": 0, None: 0}
    for _ in range(3000):
        start = draw.choice(questions).split()
        cut = draw.randrange(len(start))
        words = draw.choices(vocabulary, k=draw.randrange(8)) + start[cut:] + start[:cut]
        words = words if draw.random() < 0.7 else start + words[:3]
        words = start if draw.random() < 0.05 else words
        text = " ".join(words)
        runs = {tuple(words[i : i + 13]) for i in range(len(words) - 12)}
        expected = None
        if text in questions:
            expected = "whole"
        elif any(len(q.split()) >= 8 and f" {q} " in f" {text} " for q in questions):
            expected = "contained"
        elif any(run in count and len(set(run)) >= 5 for run in runs):
            expected = "overlap"
        assert how(index, text) == expected
        seen[expected] += 1
    assert min(seen.values()) > 20


def test_empty_texts_and_no_questions():
    index = ContaminationIndex(["", "?!", "   "])
    assert len(index) == 0
    assert how(index, "hello there") is None and how(index, "...") is None


def test_from_files_and_report(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({"question": LONG, "answer": "#### 9"}) + "\n")
    index = ContaminationIndex.from_files([str(path)])
    match = index.match(row(f"Q: {LONG}", "corpus.jsonl:7"))
    text = contamination_report([match], 12)
    assert "12 rows hold questions" in text and "corpus.jsonl:7: contained: \"Janet's" in text
    assert "contamination: drop" in text
