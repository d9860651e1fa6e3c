"""Benchmark files: official and re-dumped forms, prompts, answers joined from a file."""

import json

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.answers import load_answers
from proxykd_jax.texts.readers import read_source, sought_in_corpus
from proxykd_jax.texts.records import Drops

STEM = "Which gas do plants take in?"
CHOICES = [{"text": "oxygen", "label": "A"}, {"text": "carbon dioxide", "label": "B"}]
LISTED = {"text": ["oxygen", "carbon dioxide"], "label": ["A", "B"]}
PROMPT = f"{STEM}\n\nA. oxygen\nB. carbon dioxide"
ITEMS = {
    "gsm8k": ({"question": "How many?", "answer": "So 3.\n#### 3"}, "How many?"),
    "arc": ({"id": "M_1", "question": {"stem": STEM, "choices": CHOICES}}, PROMPT),
    "arc_redump": ({"question": STEM, "choices": LISTED, "answerKey": "B"}, PROMPT),
    "arc_numbers": (
        {"question": {"stem": STEM, "choices": [{**c, "label": str(n)} for n, c in
                                                enumerate(CHOICES, 1)]}},
        f"{STEM}\n\n1. oxygen\n2. carbon dioxide",
    ),
    "csqa": (
        {"question": {"stem": STEM, "question_concept": "gas", "choices": CHOICES}},
        PROMPT,
    ),
    "csqa_redump": ({"question": STEM, "question_concept": "gas", "choices": LISTED}, PROMPT),
    "mmlu_redump": ({"question": STEM, "choices": LISTED["text"], "answer": 1}, PROMPT),
    "agieval": (
        {"passage": None, "question": STEM, "options": ["(A)oxygen", "(B) carbon dioxide"],
         "label": "B"},
        PROMPT,
    ),
    "agieval_passage": (
        {"passage": "Plants.", "question": STEM, "options": ["(A)oxygen", "(B)carbon dioxide"],
         "label": ["B"]},
        f"Plants.\n\n{PROMPT}",
    ),
    "agieval_open": (
        {"passage": "", "question": "What is $x$?", "options": None, "label": None, "answer": "2"},
        "What is $x$?",
    ),
    "bbh": (
        {"canary": "c", "examples": [{"input": "not ( True ) is", "target": "False"}]},
        "not ( True ) is",
    ),
    "bbh_rows": ({"input": "not ( True ) is", "target": "False"}, "not ( True ) is"),
}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions_of(path):
    return [sought.text for sought in sought_in_corpus(path)]


def read(prompts_only=False, **keys):
    drops = Drops()
    rows = list(read_source(SourceConfig(**keys), prompts_only=prompts_only, drops=drops))
    return [[m.content for m in row.messages] for row in rows], drops


@pytest.mark.parametrize("case", ITEMS)
def test_prompts_and_answers(tmp_path, case):
    """Answers join by prompt, for official files and re-dumps, with format auto or by name."""
    item, prompt = ITEMS[case]
    path = write(tmp_path / "train.jsonl", [item])
    assert read(prompts_only=True, path=path)[0] == [[prompt]]
    answers = write(tmp_path / "answers.jsonl", [{"prompt": f" {prompt} ", "response": "yes"}])
    for name in ("auto", case.split("_")[0]):
        assert read(path=path, answers=answers, format=name)[0] == [[prompt, "yes"]]
    assert questions_of(path)[0] == prompt.partition("\n\nA.")[0].partition("\n\n1.")[0]
    with pytest.raises(UserError, match="Name the file of answers"):
        read(path=path)


def test_answers_by_id(tmp_path):
    """Ids have any type; without an id, file and line serve. An id may have several answers."""
    rows = [{**ITEMS["arc"][0], "id": identity} for identity in (7, "8", "9")]
    path = write(tmp_path / "arc.jsonl", rows)
    answers = [
        {"id": "7", "response": "one"},
        {"id": 8, "response": "two"},
        {"id": 8, "response": "three"},
        {"id": 8, "response": "three"},
    ]
    found, drops = read(path=path, answers=write(tmp_path / "a.jsonl", answers))
    assert found == [[PROMPT, "one"], [PROMPT, "two"], [PROMPT, "three"]]
    assert drops.as_json() == {"no answer of the teacher": {"count": 1, "first": [f"{path}:3"]}}

    path = write(tmp_path / "gsm_train.jsonl", [ITEMS["gsm8k"][0]] * 2)
    answers = [{"id": "gsm_train-2", "response": "3"}]
    found, drops = read(path=path, answers=write(tmp_path / "b.jsonl", answers))
    assert found == [["How many?", "3"]] and drops.total == 1

    tasks = [{"input": f"q{n}", "target": "a"} for n in range(3)]
    path = write(tmp_path / "task.json", [{"canary": "", "examples": tasks}])
    answers = [{"id": "task-1[2]", "response": "x"}]
    found, drops = read(path=path, answers=write(tmp_path / "c.jsonl", answers))
    assert found == [["q1", "x"]] and drops.counts == {"no answer of the teacher": 2}


def test_gold_answers_are_never_the_teachers(tmp_path):
    path = write(tmp_path / "train.jsonl", [ITEMS["gsm8k"][0]])
    answers = write(tmp_path / "a.jsonl", [{"prompt": "other", "response": "x"}])
    with pytest.raises(UserError, match="no answer of the teacher: 1"):
        read(path=path, answers=answers)


@pytest.mark.parametrize(
    "row", [{"id": "1"}, {"response": "a"}, {"id": None, "response": "a"}, {"text": "a"}]
)
def test_answers_need_an_id_or_a_prompt(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match=r"a.jsonl:1"):
        load_answers(path)


CSV = {
    "official": '"A, ""b"" or c?",0,4,2,6,B\nNext,w,x,y,z,A\n',
    "header": 'question,choice0,choice1,choice2,choice3,answer\n"A, ""b"" or c?",0,4,2,6,1\n'
    "Next,w,x,y,z,0\n",
}


@pytest.mark.parametrize("case", CSV)
def test_mmlu_csv_with_and_without_header(tmp_path, case):
    (tmp_path / "x_dev.csv").write_text(CSV[case])
    found, _ = read(prompts_only=True, path=f"{tmp_path}/x_dev.csv")
    assert found == [['A, "b" or c?\n\nA. 0\nB. 4\nC. 2\nD. 6'], ["Next\n\nA. w\nB. x\nC. y\nD. z"]]


@pytest.mark.parametrize(
    "text", ["a,b,c\n", "q,1,2,3,4,E\n", 'q,1,2,3,4,"A\n', "", "q,1,2,3,4,7\n"]
)
def test_other_csv_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=r"a\.csv"):
        read(prompts_only=True, path=f"{tmp_path}/a.csv")


def test_damaged_items_are_counted(tmp_path):
    good = ITEMS["arc"][0]
    bad = [
        {"id": 1, "question": {"stem": None, "choices": CHOICES}},
        {"id": 2, "question": {"stem": STEM, "choices": None}},
        {"id": 3, "question": {"stem": STEM, "choices": CHOICES[:1]}},
        {"id": 4, "question": {"stem": STEM, "choices": [*CHOICES, {"label": "C", "text": None}]}},
        {"id": 5},
    ]
    path = write(tmp_path / "arc.jsonl", [good, *bad])
    found, drops = read(prompts_only=True, path=path)
    assert found == [[PROMPT]]
    assert drops.counts == {
        "empty prompt": 2,
        "question without its choices": 2,
        "choice without text": 1,
    }
    assert questions_of(path) == [STEM, PROMPT]


def test_mt_bench(tmp_path):
    questions = [{"question_id": n, "category": "c", "turns": ["q", "r"]} for n in (81, 82)]
    path = write(tmp_path / "question.jsonl", questions)
    reply = {"question_id": 81, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["a", "b"]}]}
    answers = write(tmp_path / "gpt-4.jsonl", [reply])
    found, drops = read(path=path, answers=answers)
    assert found == [["q", "a"], ["q", "a", "r", "b"]]
    assert drops.counts == {"no answer of the teacher": 1}
    assert read(path=path, answers=answers, turns="last")[0] == [["q", "a", "r", "b"]]
    assert read(path=path, prompts_only=True)[0] == [["q"], ["q"]]
    assert questions_of(path) == ["q", "r", "q", "r"]
    single = write(tmp_path / "single.jsonl", [{"id": "82", "response": "a"}])
    assert read(path=path, answers=single)[0] == [["q", "a"]]


def test_questions_of_ordinary_files(tmp_path):
    write(tmp_path / "a.jsonl", [{"prompt": "one", "response": "x"}, {"prompt": ""}])
    write(tmp_path / "b.jsonl", [{"text": "two"}])
    assert questions_of(str(tmp_path)) == ["one", "two"]
