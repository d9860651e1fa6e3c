"""Reading sources as rows: every schema, every reason to drop a row, mixed formats."""

import json

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.conversations import NO_CALL
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, Message, TextRow

U, A, S = "user", "assistant", "system"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, *, prompts_only=False, **keys):
    drops = Drops()
    source = SourceConfig(path=str(path), **keys)
    return list(read_source(source, prompts_only=prompts_only, drops=drops)), drops


def turns(rows):
    return [[(message.role, message.content) for message in row.messages] for row in rows]


def chat(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


QA = [[(U, "q"), (A, "a")]]
SQA = [[(S, "s"), (U, "q"), (A, "a")]]
SCHEMAS = {
    "prompt_response": ({"prompt": "q", "response": "a"}, "prompt_response", QA),
    "prompt_completion": ({"prompt": "q", "completion": "a", "id": 3}, "prompt_response", QA),
    "prompt_system": ({"prompt": "q", "response": "a", "system": "s"}, "prompt_response", SQA),
    "trl_chat": (
        {"prompt": chat((S, "s"), (U, "q")), "completion": chat((A, "a"))},
        "prompt_response",
        SQA,
    ),
    "messages": ({"messages": chat((S, "s"), (U, "q"), (A, "a"))}, "messages", SQA),
    "messages_parts": (
        {"messages": chat((U, [{"type": "text", "text": "q"}]), (A, "a"))},
        "messages",
        QA,
    ),
    "developer": ({"messages": chat(("developer", "s"), (U, "q"), (A, "a"))}, "messages", SQA),
    "columns": ({"messages": {"role": [U, A], "content": ["q", "a"]}}, "messages", QA),
    "preferred": (
        {
            "input": {"messages": chat((S, "s"), (U, "q"))},
            "preferred_output": chat((A, "a")),
            "non_preferred_output": chat((A, "b")),
        },
        "messages",
        SQA,
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a", "text": "x"}, "alpaca", QA),
    "alpaca_input": (
        {"instruction": "q", "input": "i", "output": "a"},
        "alpaca",
        [[(U, "q\n\ni"), (A, "a")]],
    ),
    "gpteacher": ({"instruction": "q", "input": None, "response": "a"}, "alpaca", QA),
    "alpaca_eval": (
        {"instruction": "q", "output": "a", "generator": "g", "dataset": "d"},
        "alpaca",
        QA,
    ),
    "sharegpt": (
        {"conversations": chat((S, "s"), ("human", "q"), ("gpt", "a"), keys=("from", "value"))},
        "sharegpt",
        SQA,
    ),
    "openorca": (
        {"id": "t0.1", "system_prompt": "s", "question": "q", "response": "a"},
        "openorca",
        SQA,
    ),
    "openorca_no_system": (
        {"id": "t0.1", "system_prompt": "", "question": "q", "response": "a"},
        "openorca",
        QA,
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: q\n\nAssistant: ",
            "answers": [
                {"answer": "best", "model": "claude", "rank": 1.0},
                {"answer": "a", "model": "gpt-4-0613", "rank": 5.0},
                {"answer": "no", "model": "gpt-3.5-turbo", "rank": 2.0},
            ],
            "turns": 1,
            "num_responses": 3,
        },
        "nectar",
        QA,
    ),
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas(tmp_path, case, named):
    record, name, expected = SCHEMAS[case]
    path = write(tmp_path / "a.jsonl", [record])
    rows, drops = read(path, format=name if named else "auto")
    assert turns(rows) == expected and not drops.total
    assert rows[0].origin == f"{path}:1" and rows[0].has_answer
    prompts, _ = read(path, prompts_only=True)
    assert turns(prompts) == [expected[0][:-1]] and not prompts[0].has_answer


def test_plain_text(tmp_path):
    rows, _ = read(write(tmp_path / "a.jsonl", [{"text": " Once upon a time. \n"}]))
    assert rows == [TextRow((), " Once upon a time. \n", f"{tmp_path}/a.jsonl:1", 0)]


def test_texts_are_not_touched(tmp_path):
    """Text of special tokens, dates and white space reach the tokenizer unchanged."""
    answer = " 2024-01-01</s> <|eot_id|> [INST]\r\n\tİ ﬁ "
    rows, _ = read(write(tmp_path / "a.jsonl", [{"prompt": " q ", "response": answer}]))
    assert rows[0].messages == (Message(U, " q "), Message(A, answer))


VERDICTS = {
    "missing": ({"prompt": "q"}, "empty answer"),
    "null": ({"prompt": "q", "response": None}, "empty answer"),
    "empty": ({"prompt": "q", "response": ""}, "empty answer"),
    "blank": ({"prompt": "q", "response": " \n\u3000"}, "empty answer"),
    "number": ({"prompt": "q", "response": 7}, "content that is not text"),
    "no_prompt": ({"response": "a"}, "keys or types that do not fit the format prompt_response"),
    "null_prompt": ({"prompt": None, "response": "a"}, "empty prompt"),
    "blank_prompt": ({"prompt": "\n", "response": "a"}, "empty prompt"),
    "surrogate": ({"prompt": "q", "response": "x\ud83d"}, "half of a surrogate pair in the text"),
    "nul": ({"prompt": "q\0", "response": "a"}, "NUL character in the text"),
}
CHAT_VERDICTS = {
    "role": (chat((U, "q"), ("narrator", "x"), (A, "a")), "unknown role"),
    "tool_role": (chat((U, "q"), ("tool", "x"), (A, "a")), NO_CALL),
    "no_role": ([{"content": "q"}], "keys or types that do not fit the format messages"),
    "null_role": ([{"role": None, "content": "q"}], "unknown role"),
    "two_answers": (chat((U, "q"), (A, "a"), (A, "b")), "two assistant turns in a row"),
    "two_questions": (chat((U, "q"), (U, "r"), (A, "a")), "two user turns in a row"),
    "ends_with_user": (chat((U, "q"), (A, "a"), (U, "r")), "prompt without answer"),
    "starts_with_answer": (chat((A, "a"), (U, "r"), (A, "b")), "no prompt"),
    "late_system": (chat((U, "q"), (S, "s"), (A, "a")), "system message after the start"),
    "system_only": (chat((S, "s")), "no prompt"),
    "none": ([], "no prompt"),
    "null": (None, "no prompt"),
    "empty_answer_inside": (chat((U, "q"), (A, " "), (U, "r"), (A, "b")), "empty answer"),
    "image": (
        chat((U, [{"type": "image_url", "image_url": "x"}]), (A, "a")),
        "content that is not text",
    ),
    "tool_call": (chat((U, "q"), (A, None)), "empty answer"),
    "not_objects": (["q", "a"], "keys or types that do not fit the format messages"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_bad_rows_are_counted_and_the_others_read(tmp_path, case):
    record, reason = VERDICTS[case]
    good = {"prompt": "q", "response": "a"}
    rows, drops = read(write(tmp_path / "a.jsonl", [good, record, good]))
    assert turns(rows) == QA * 2
    assert drops.as_json() == {reason: {"count": 1, "first": [f"{tmp_path}/a.jsonl:2"]}}


@pytest.mark.parametrize("case", CHAT_VERDICTS)
def test_bad_conversations_are_counted(tmp_path, case):
    messages, reason = CHAT_VERDICTS[case]
    good = {"messages": chat((U, "q"), (A, "a"))}
    rows, drops = read(write(tmp_path / "a.jsonl", [good, {"messages": messages}, good]))
    assert turns(rows) == QA * 2 and drops.counts == {reason: 1}


def test_turns_each_and_last(tmp_path):
    whole = [(S, "s"), (U, "q"), (A, "a"), (U, "r"), (A, "b")]
    path = write(tmp_path / "a.jsonl", [{"messages": chat(*whole)}])
    assert turns(read(path)[0]) == [whole[:3], whole]
    assert turns(read(path, turns="last")[0]) == [whole]
    assert turns(read(path, prompts_only=True)[0]) == [whole[:2], whole[:4]]
    assert turns(read(path, prompts_only=True, turns="last")[0]) == [whole[:4]]
    assert len({row.first_user_message for row in read(path)[0]}) == 1


def test_an_answer_of_weight_0_is_context(tmp_path):
    whole = chat((U, "q"), (A, "a"), (U, "r"), (A, "b"))
    whole[1]["weight"] = 0
    path = write(tmp_path / "f.jsonl", [{"messages": whole}, {"messages": whole[:2]}])
    rows, drops = read(path)
    assert turns(rows) == [[(U, "q"), (A, "a"), (U, "r"), (A, "b")]]
    assert drops.counts == {"every answer is flagged as context only": 1}
    assert turns(read(path, prompts_only=True)[0])[0] == [(U, "q")]
    whole[1]["weight"] = 1
    assert len(read(write(path, [{"messages": whole}]))[0]) == 2


def test_nectar_turns_and_several_teachers(tmp_path):
    record = {
        "prompt": "\n\nHuman: one\nline \n\nAssistant: two \n\nHuman: three \n\nAssistant: ",
        "answers": [
            {"answer": answer, "model": model, "rank": 1.0}
            for answer, model in (("x", "gpt-4"), ("y", "gpt-4-turbo"), ("", "gpt-4"), ("z", "m"))
        ],
    }
    start = [(U, "one\nline"), (A, "two"), (U, "three")]
    path = write(tmp_path / "a.jsonl", [record])
    rows, drops = read(path, turns="last")
    assert turns(rows) == [[*start, (A, "x")], [*start, (A, "y")]]
    assert drops.counts == {"empty answer": 1}
    assert turns(read(path, turns="last", teacher="m")[0]) == [[*start, (A, "z")]]
    with pytest.raises(UserError, match="no answer of the teacher: 1"):
        read(path, teacher="palm")


@pytest.mark.parametrize(
    ("name", "teacher", "fine"),
    [
        ("1M-GPT4-Augmented.jsonl", "gpt-4", True),
        ("3_5M-GPT3_5-Augmented.jsonl", "gpt-4", False),
        ("3_5M-GPT3_5-Augmented.jsonl", "gpt-3.5-turbo", True),
        ("1M-GPT4-Augmented.jsonl", "gpt-3.5", False),
        ("orca.jsonl", "gpt-4", True),
    ],
)
def test_openorca_teacher_is_told_by_the_file_name(tmp_path, name, teacher, fine):
    path = write(tmp_path / name, [SCHEMAS["openorca"][0]])
    if fine:
        assert turns(read(path, teacher=teacher)[0]) == SQA
    else:
        with pytest.raises(UserError, match=r"no column for the model|answers of GPT-4, by"):
            read(path, teacher=teacher)
        assert read(path, teacher=teacher, prompts_only=True)[0]


@pytest.mark.parametrize("name", [entry[1] for entry in SCHEMAS.values()] + ["text", "gsm8k"])
def test_a_format_that_does_not_fit_shows_the_keys(tmp_path, name):
    path = write(tmp_path / "a.jsonl", [{"foo": "q", "bar": [1]}])
    with pytest.raises(UserError, match=r"a.jsonl:1 does not fit .*foo \(str\), bar \(list\)"):
        read(path, format=name)


def test_no_known_format_lists_them_all(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"foo": "q"}])
    with pytest.raises(UserError, match=r"(?s)foo \(str\).*alpaca: instruction.*bbh"):
        read(path)


def test_no_usable_row_is_an_error_with_the_reasons(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q"}, {"prompt": "r", "response": ""}])
    with pytest.raises(UserError, match=r"no row that can be used.*empty answer: 2"):
        read(path)


def test_folder_and_glob_mix_formats_in_sorted_order(tmp_path):
    write(tmp_path / "b.jsonl", [{"prompt": "b", "response": "a"}])
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "a", "output": "a"}] * 2))
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub" / "c.jsonl", [{"messages": chat((U, "c"), (A, "a"))}])
    write(tmp_path / "sub" / ".hidden.jsonl", [{"prompt": "x", "response": "a"}])
    (tmp_path / "notes.md").write_text("no data")
    rows, _ = read(tmp_path)
    assert [row.messages[0].content for row in rows] == ["a", "a", "b", "c"]
    rows, _ = read(tmp_path / "*.json*")
    assert [row.messages[0].content for row in rows] == ["a", "a", "b"]
    rows, _ = read(tmp_path, limit=2)
    assert len(rows) == 2


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no file that ends in"):
        read(tmp_path)
    write(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a"}])
    with pytest.raises(UserError, match="answers may be given for gsm8k"):
        read(tmp_path, answers=str(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"file of answers .* does not exist"):
        read(tmp_path, answers=str(tmp_path / "b.jsonl"))


def test_source_index_is_copied(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "response": "a"}])
    source = SourceConfig(path=str(path))
    (row,) = read_source(source, prompts_only=False, drops=Drops(), source_index=3)
    assert row.source_index == 3


def test_drops_merge_and_survive_json():
    one, two = Drops(keep=2), Drops()
    for place in range(3):
        one.add("a", f"f:{place}")
        two.add("a" if place else "b", f"g:{place}")
    one.merge(two)
    assert one.counts == {"a": 5, "b": 1} and one.total == 6
    assert one.origins == {"a": ["f:0", "f:1"], "b": ["g:0"]}
    again = Drops.from_json(json.loads(json.dumps(one.as_json())))
    assert again.as_json() == one.as_json()
    assert str(one) == "a: 5 (first at f:0); b: 1 (first at g:0)"
