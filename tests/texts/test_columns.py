"""A file's own column names, files of unknown layout, and rows of several models."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts import readers
from proxykd_jax.texts.readers import read_records, read_source
from proxykd_jax.texts.records import Drops, Notes

QA = {"prompt": "question", "response": "reply"}
ROW = {"question": "q", "reply": "a"}
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, *, prompts_only=False, **keys):
    drops, notes = Drops(), Notes()
    source = SourceConfig(path=str(path), **keys)
    rows = list(read_source(source, prompts_only=prompts_only, drops=drops, notes=notes))
    return [[m.content for m in row.messages] or row.text for row in rows], drops, notes.counts


MAPPED = {
    "prompt_response": (ROW, QA, ["q", "a"]),
    "one_of_two": ({"question": "q", "response": "a"}, {"prompt": "question"}, ["q", "a"]),
    "beside": (
        {**ROW, "sys": "s", "about": "c", "qid": 7},
        {**QA, "system": "sys", "context": "about", "id": "qid"},
        ["s", "q\n\nc", "a"],
    ),
    "turns": ({"dialog": TURNS, "rules": "s"}, {"messages": "dialog", "system": "rules"},
              ["s", "q", "a"]),
    "turns_in_a_text": ({"dialog": json.dumps(TURNS)}, {"messages": "dialog"}, ["q", "a"]),
    "turns_of_python": ({"dialog": str(TURNS)}, {"messages": "dialog"}, ["q", "a"]),
    "text": ({"story": "Once."}, {"text": "story"}, "Once."),
    "swapped": ({"prompt": "a", "response": "q"}, {"prompt": "response", "response": "prompt"},
                ["q", "a"]),
    "like_gsm8k": ({"question": "q", "answer": "a #### 3"},
                   {"prompt": "question", "response": "answer"}, ["q", "a #### 3"]),
    "beside_alone": ({"instruction": "q", "output": "a", "rules": "s"}, {"system": "rules"},
                     ["s", "q", "a"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MAPPED)
def test_columns(tmp_path, case):
    row, columns, expected = MAPPED[case]
    path = write(tmp_path / "a.jsonl", row)
    found, drops, notes = read(path, columns=columns)
    assert (found, drops.total, notes) == ([expected], 0, {})
    if isinstance(expected, list):
        assert read(path, columns=columns, prompts_only=True)[0] == [expected[:-1]]


def test_a_row_without_the_column_is_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW, {"question": "q"}, {"reply": "a"}, ROW)
    found, drops, _ = read(path, columns=QA)
    assert len(found) == 2 and drops.counts == {
        "no column reply (columns.response)": 1,
        "no column question (columns.prompt)": 1,
    }
    assert len(read(path, columns=QA, prompts_only=True)[0]) == 3  # a prompt needs no response


def test_a_column_that_is_not_there_is_named_with_the_nearest(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    said = r"a.jsonl:1 has no column 'questoin', which columns.prompt names. It has question, "
    with pytest.raises(UserError, match=said + r"reply; the nearest is 'question'\."):
        read(path, columns={"prompt": "questoin"})
    with pytest.raises(UserError, match=r"no column 'zzz'.* It has question, reply\."):
        read(path, columns={"prompt": "question", "response": "zzz"})


def test_the_key_that_a_column_takes_the_place_of_is_named(tmp_path):
    row = {**ROW, "prompt": "own", "answer": "other", "id": "7", "qid": "8", "context": "c"}
    found, _, notes = read(write(tmp_path / "a.jsonl", row), columns={**QA, "id": "qid"})
    assert found == [["q\n\nc", "a"]]
    assert notes == {
        "the key prompt (the file's own) is not read": 1,
        "the key answer is not read": 1,
    }


REFUSED = [
    ({"promt": "q"}, "auto", "columns: promt is none of the keys .* mean 'prompt'"),
    ({"zzz": "q"}, "auto", "none of the keys that can be given; prompt, response"),
    ({"prompt": ""}, "auto", "prompt needs the name of a column"),
    ({"prompt": "q", "messages": "m"}, "auto", "prompt, messages belong to different formats"),
    ({"prompt": "q"}, "nectar", "format: nectar; give format: prompt_response, or leave"),
    ({"messages": "m"}, "sharegpt", "format: sharegpt; give format: messages"),
    ({"prompt": "q"}, "gsm8k", "format: gsm8k"),
    ({"system": "s"}, "openorca", "format: openorca; leave one of them out"),
    ({"text": "t", "system": "s"}, "auto", "a plain text has no system"),
]


@pytest.mark.parametrize(("columns", "name", "said"), REFUSED)
def test_columns_that_cannot_be_mapped(columns, name, said):
    with pytest.raises(ValidationError, match=said):
        SourceConfig(path="a", columns=columns, format=name)


def test_parquet_and_records(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"question": ["q"], "reply": ["a"], "gold_text": ["g"]}), path)
    columns = {**QA, "gold": "gold_text"}
    assert read(path, columns=columns)[0] == [["q", "a"]]
    ((name, record, _),) = read_records(SourceConfig(path=str(path), columns=columns))
    assert name == "prompt_response" and record["gold"] == "g"


@pytest.mark.parametrize("kind", ["dataset", "tfds"])
def test_datasets_and_tfds(monkeypatch, kind):
    monkeypatch.setattr(readers, f"read_{kind}", lambda *_: iter([(ROW, "x:1")]))
    source = SourceConfig(**{kind: "x", "columns": QA})
    (row,) = read_source(source, prompts_only=False, drops=Drops())
    assert [m.content for m in row.messages] == ["q", "a"]


LAYOUTS = [
    (ROW, "nearest is prompt_response: it also needs prompt and response.",
     "columns: {prompt: question, response: reply}"),
    ({"question": "q", "answer": "a"}, "nearest is prompt_response: it also needs prompt.",
     "columns: {prompt: question, response: answer}"),
    ({"question": "q", "response": "a"}, "nearest is prompt_response: it also needs prompt.",
     "columns: {prompt: question, response: response}"),
    ({"custom_id": "1", "url": "u"}, "nearest is batch: it also needs body.", "columns"),
    ({"messages": "x"}, "nearest is messages: its messages hold other values.",
     "columns: {prompt: ..., response: ...}"),
    ({"dialog": TURNS}, "nearest is messages: it also needs messages.",
     "columns: {messages: dialog}"),
    ({"foo": "q"}, "has the keys", "columns: {prompt: ..., response: ...}"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "near", "example"), LAYOUTS)
def test_an_unknown_layout(tmp_path, row, near, example):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "a.jsonl", row))
    said = str(error.value)
    assert near in said and example in said and "\n  alpaca: instruction" in said
    assert ("nearest" in said) == ("nearest" in near)


def test_long_keys_are_cut_in_messages(tmp_path):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "a.jsonl", {f"{n}" * 500: "x" for n in range(10, 50)}))
    assert len(str(error.value)) < 4000 and "and 10 more" in str(error.value)


MODELS = [
    ("GPT-4", ["gpt4_0613", "openai/gpt-4", "claude-2", None], 3, "claude-2"),
    ("claude", ["claude-2", "claude-2", "Claude 3", None], 4, None),
]


@pytest.mark.parametrize("key", ["model", "generator", "model_name", "who"])
@pytest.mark.parametrize(("teacher", "models", "kept", "dropped"), MODELS)
def test_rows_of_another_model_are_counted(tmp_path, key, teacher, models, kept, dropped):
    rows = [{"instruction": "q", "output": "a", key: model} for model in models]
    path = write(tmp_path / "a.jsonl", *rows)
    columns = {"model": "who"} if key == "who" else {}
    found, drops, notes = read(path, teacher=teacher, columns=columns)
    expected = {f"an answer of another model ({dropped})": 1} if dropped else {}
    assert (len(found), drops.counts, notes) == (kept, expected, {})
    assert len(read(path, teacher="x", columns=columns, prompts_only=True)[0]) == 4


def test_a_file_of_several_models_is_noted(tmp_path):
    rows = [{"prompt": f"{n}", "response": "a", "model": "xyy"[n % 3]} for n in range(6)]
    path = write(tmp_path / "a.jsonl", *rows)
    said = "answers of 2 models are mixed, y (4), x (2); teacher keeps those of one"
    assert read(path)[2] == {said: 6} and len(read(path)[0]) == 6
    assert read(path, limit=3)[2] == {
        "answers of 2 models are mixed, y (2), x (1); teacher keeps those of one": 3
    }
    assert not read(write(tmp_path / "b.jsonl", *rows[1:3]))[2]
