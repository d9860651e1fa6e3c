"""Keys beside a row's texts: each is used, or it is named."""

import json

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.texts.conversations import NOTHING_LEARNT
from proxykd_jax.texts.formats import NO_TURNS
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import OTHER_NOTES, Drops, Notes
from proxykd_jax.texts.row_keys import NO_CALL_THERE, REASONING

U, A, S = "user", "assistant", "system"


def chat(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def read(tmp_path, *records, **keys):
    """Turns of every row, the drops and the notes."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    drops, notes = Drops(), Notes()
    prompts_only = keys.pop("prompts_only", False)
    source = SourceConfig(path=str(path), **keys)
    rows = read_source(source, prompts_only=prompts_only, drops=drops, notes=notes, is_piece=True)
    turns = [[(message.role, message.content) for message in row.messages] for row in rows]
    return turns, drops, notes


# --- what stands before the prompt ----------------------------------------------------------------


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat((U, "q"), (A, "a"))},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"conversation": chat((U, "q"), (A, "a"))},
        {"prompt": "q", "response": "a"},
        {"prompt": chat((U, "q")), "chosen": chat((A, "a")), "rejected": chat((A, "b"))},
        {"instruction": "q", "output": "a"},
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a", "model": "gpt-4"}]},
    ],
)
def test_a_system_text_is_used_wherever_it_stands(tmp_path, key, row):
    turns, drops, notes = read(tmp_path, row | {key: "Be brief."})
    assert turns == [[(S, "Be brief."), (U, "q"), (A, "a")]]
    assert not drops.total and not notes.counts
    assert read(tmp_path, row | {key: " "})[0] == [[(U, "q"), (A, "a")]]


def test_two_system_texts_are_both_said(tmp_path):
    own = chat((S, "Speak Greek."), (U, "q"), (A, "a"))
    turns, _, _ = read(tmp_path, {"system": "Be brief.", "messages": own})
    assert turns == [[(S, "Be brief.\n\nSpeak Greek."), (U, "q"), (A, "a")]]
    assert read(tmp_path, {"system": "Speak Greek.", "messages": own})[0][0][0] == (
        S,
        "Speak Greek.",
    )


@pytest.mark.parametrize(
    "history",
    [
        [["h", "b"]],
        chat((U, "h"), (A, "b")),
        [{"from": "human", "value": "h"}, {"from": "gpt", "value": "b"}],
        [{"user": "h", "assistant": "b"}],
        [{"question": "h", "answer": "b"}],
        ["h", "b"],
        {"role": [U, A], "content": ["h", "b"]},
        '[["h", "b"]]',
    ],
)
@pytest.mark.parametrize(
    "row", [{"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}]
)
def test_history_becomes_turns(tmp_path, history, row):
    turns, drops, notes = read(tmp_path, row | {"system": "s", "history": history}, turns="last")
    assert turns == [[(S, "s"), (U, "h"), (A, "b"), (U, "q"), (A, "a")]]
    assert not drops.total and not notes.counts
    for nothing in ([], None, "", [[]]):
        assert read(tmp_path, row | {"chat_history": nothing})[0] == [[(U, "q"), (A, "a")]]


def test_history_that_is_neither_is_counted(tmp_path):
    for history in ("we spoke before", ["h"], [["h", "b", "c"]], [3, "x"]):
        turns, drops, _ = read(tmp_path, {"prompt": "q", "response": "a", "history": history})
        assert not turns and drops.counts == {NO_TURNS: 1}


@pytest.mark.parametrize("key", ["input", "context", "passage", "document", "background"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "response": "a"},
        {"prompt": "q", "response": "a"},
        {"prompt": chat((U, "q")), "completion": chat((A, "a"))},
        {"system_prompt": "", "question": "q", "response": "a"},
    ],
)
def test_context_is_part_of_the_prompt(tmp_path, key, row):
    turns, _, notes = read(tmp_path, row | {key: "The lake."})
    assert turns == [[(U, "q\n\nThe lake."), (A, "a")]] and not notes.counts
    assert read(tmp_path, row | {key: ["The lake.", "The hill."]})[0] == [
        [(U, "q\n\nThe lake.\n\nThe hill."), (A, "a")]
    ]
    for nothing in (None, " ", []):
        assert read(tmp_path, row | {key: nothing})[0] == [[(U, "q"), (A, "a")]]
    _, drops, _ = read(tmp_path, row | {key: 7})
    assert drops.counts == {"content that is not text": 1}


def test_a_prompt_that_quotes_its_context_gets_it_once(tmp_path):
    row = {"prompt": "The lake.\nq", "context": " The lake. ", "response": "a"}
    assert read(tmp_path, row)[0] == [[(U, "The lake.\nq"), (A, "a")]]


# --- answers that are none, and flags -------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("finish_reason", "length", "cut off"),
        ("finish_reason", ["length"], "cut off"),
        ("stop_reason", "max_tokens", "cut off"),
        ("finishReason", "MAX_TOKENS", "cut off"),
        ("done_reason", "length", "cut off"),
        ("status", "incomplete", "cut off"),
        ("finish_reason", "content_filter", "filtered"),
        ("finishReason", "SAFETY", "filtered"),
        ("finish_reason", "tool_calls", NO_CALL_THERE),
        ("stop_reason", "tool_use", NO_CALL_THERE),
        ("error", {"code": 500, "message": "busy"}, "failed"),
        ("refusal", "I cannot help.", "refused"),
        ("label", False, "label: false"),
        ("is_valid", False, "is_valid: false"),
        ("finished", False, "finished: false"),
        ("accepted", "no", "accepted: false"),
        ("rejected", True, "rejected: true"),
        ("truncated", 1, "truncated: true"),
        ("weight", 0, "weight: 0"),
        ("weight", 0.0, "weight: 0"),
        ("train", False, "train: false"),
        ("loss", False, "loss: false"),
        ("reasoning", {"effort": 3}, REASONING),
        ("tools", "a hammer", "tools"),
        ("tool_calls", [{"name": None}, {"id": "1"}], "tool call"),
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a"},
        {"instruction": "q", "output": "a"},
        {"messages": chat((U, "q"), (A, "a"))},
        {"text": "A text. Its rest."},
    ],
)
def test_rows_that_are_not_to_be_learnt(tmp_path, row, key, value, reason):
    turns, drops, _ = read(tmp_path, row, row | {key: value})
    assert len(turns) == 1 and drops.total == 1
    assert reason in next(iter(drops.counts))


@pytest.mark.parametrize(
    "beside",
    [
        {"finish_reason": "stop", "stop_reason": None, "error": None, "refusal": ""},
        {"stop_reason": "end_turn", "label": True, "is_valid": True, "weight": 1},
        {"label": 0, "rejected": "No.", "truncated": False, "finished": True, "error": False},
        {"tools": [], "functions": "[]", "tool_calls": None, "reasoning": " ", "thinking": None},
        {"function_call": {"name": None, "arguments": None}, "weight": 1.0, "status": "completed"},
        {"id": 3, "model": "m", "category": "c", "created": 1, "source": "s", "score": 0.5},
    ],
)
def test_rows_with_harmless_keys(tmp_path, beside):
    for row in ({"prompt": "q", "response": "a"}, {"messages": chat((U, "q"), (A, "a"))}):
        turns, drops, notes = read(tmp_path, row | beside)
        assert turns == [[(U, "q"), (A, "a")]] and not drops.total and not notes.counts


def test_prompts_do_not_ask_about_answers(tmp_path):
    row = {"prompt": "q", "response": "a", "finish_reason": "length", "label": False}
    assert read(tmp_path, row, prompts_only=True)[0] == [[(U, "q")]]
    row = {"messages": [*chat((U, "q")), {"role": A, "content": "a", "reasoning": "r"}]}
    assert read(tmp_path, row, prompts_only=True)[0] == [[(U, "q")]]
    row = {"prompt": "q", "tools": [{"name": "t"}]}
    assert read(tmp_path, row, prompts_only=True)[0] == [[(U, "q")]]


@pytest.mark.parametrize(
    "flag",
    [{"weight": 0}, {"train": False}, {"loss": False}, {"train_on_turn": False}, {"mask": True}],
)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")])
def test_flagged_turns_are_context_only(tmp_path, flag, keys):
    def turn(role, text, **flags):
        return dict(zip(keys, (role, text), strict=True)) | flags

    name = "messages" if keys[0] == "role" else "conversations"
    first = {name: [turn(U, "q"), turn(A, "a", **flag), turn(U, "r"), turn(A, "b")]}
    last = {name: [turn(U, "q"), turn(A, "a"), turn(U, "r"), turn(A, "b", **flag)]}
    whole = [(U, "q"), (A, "a"), (U, "r"), (A, "b")]
    for keep in ("each", "last"):
        assert read(tmp_path, first, turns=keep)[0] == [whole]
        assert read(tmp_path, last, turns=keep)[0] == [whole[:2]]
    turns, drops, _ = read(tmp_path, {name: [turn(U, "q"), turn(A, "a", **flag)]})
    assert not turns and drops.counts == {NOTHING_LEARNT: 1}


def test_an_answer_that_was_cut_off_may_be_context(tmp_path):
    messages = chat((U, "q"), (A, "a"), (U, "go on"), (A, "b"))
    messages[1]["finish_reason"] = "length"
    turns, drops, _ = read(tmp_path, {"messages": messages})
    assert turns == [[(U, "q"), (A, "a"), (U, "go on"), (A, "b")]]
    assert drops.counts == {"an answer that was cut off (finish_reason: length)": 1}


# --- keys that nobody reads -----------------------------------------------------------------------


def test_unread_keys_are_named_with_count_and_example(tmp_path):
    rows = [
        {"prompt": f"q{n}", "response": "a", "note": "n" * 200, "n": n, "empty": " "}
        for n in range(3)
    ]
    rows[1]["deep"] = {"x": [{"y": "z"}]}
    _, _, notes = read(tmp_path, *rows)
    path = f"{tmp_path}/rows.jsonl"
    assert notes.as_json() == {
        "the key note is not read": {
            "count": 3,
            "first": f"{path}:1",
            "example": "n" * 80 + "...",
        },
        "the key deep is not read": {
            "count": 1,
            "first": f"{path}:2",
            "example": '{"x": [{"y": "z"}]}',
        },
    }


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "q", "response": "a", "output": "b"}, "output"),
        ({"prompt": "q", "response": "a", "weight": 0.5}, "weight"),
        ({"prompt": "q", "response": "a", "finish_reason": "because"}, "finish_reason"),
        ({"prompt": "q", "response": "a", "is_valid": "perhaps"}, "is_valid"),
        ({"prompt": "q", "response": "a", "system": "s", "system_prompt": "t"}, "system_prompt"),
        ({"instruction": "q", "output": "a", "prompt": "p"}, "prompt"),
        ({"messages": chat((U, "q"), (A, "a")), "input": "i"}, "input"),
        ({"messages": chat((U, "q"), (A, "a")), "context": "i"}, "context"),
        ({"text": "A text. More.", "prompts": ["x"]}, "prompts"),
        ({"messages": [{"role": U, "content": "q", "mood": "m"}, *chat((A, "a"))]},
         "messages[].mood"),
        ({"question": "2+3?", "answer": "#### 5", "hint": "h"}, "hint"),
    ],
)  # fmt: skip
def test_every_format_names_what_it_does_not_read(tmp_path, row, named):
    keys = {"prompts_only": True} if "question" in row else {}
    _, drops, notes = read(tmp_path, row, **keys)
    assert list(notes.counts) == [f"the key {named} is not read"] and not drops.total


def test_answers_that_end_with_an_end_token_s_letters(tmp_path):
    answers = ["Yes.</s>", "Yes.<|im_end|>\n", "Yes </s> no", "<|eot_id|> Yes"]
    turns, _, notes = read(tmp_path, *({"prompt": str(a), "response": a} for a in answers))
    assert len(turns) == 4
    assert {note.split()[4].rstrip(",") for note in notes.counts} == {"</s>", "<|im_end|>"}


def test_notes_merge_survive_json_and_stay_few():
    one, two = Notes(most=2), Notes(most=2)
    for place in range(4):
        one.add(f"n{place % 2}", f"f:{place}", "x")
        two.add(f"n{place}", f"g:{place}", "y")
    assert two.counts == {"n0": 1, "n1": 1, OTHER_NOTES: 2}
    one.merge(two)
    assert one.counts == {"n0": 3, "n1": 3, OTHER_NOTES: 2}
    assert one.examples["n0"] == ("f:0", "x") and one.examples[OTHER_NOTES] == ("g:2", "y")
    assert Notes.from_json(json.loads(json.dumps(one.as_json()))).as_json() == one.as_json()


# --- answers in a file of their own ---------------------------------------------------------------


def test_flags_of_answers_that_lie_apart(tmp_path):
    answers = tmp_path / "answers.jsonl"
    lines = [
        {"id": "rows-1", "response": "5"},
        {"id": "rows-2", "response": "1", "finish_reason": "length", "why": "w"},
        {"id": "rows-3", "response": "7", "why": "w"},
    ]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = [{"question": f"2+{n}?", "answer": f"#### {n}"} for n in (3, 4, 5, 6)]
    turns, drops, notes = read(tmp_path, *items, answers=str(answers))
    assert [row[-1][1] for row in turns] == ["5", "7"]
    assert drops.counts == {
        "an answer that was cut off (finish_reason: length)": 1,
        "no answer of the teacher": 1,
    }
    assert notes.counts == {"the key answers.why is not read": 2}


def test_the_output_of_a_batch_is_a_file_of_answers(tmp_path):
    def line(number, content, reason="stop", **message):
        choice = {"message": {"role": A, "content": content} | message, "finish_reason": reason}
        body = {"status_code": 200, "body": {"choices": [choice]}}
        return {"id": f"b{number}", "custom_id": f"rows-{number}", "response": body, "error": None}

    lines = [line(1, "5"), line(2, "6", "length"), line(3, None, tool_calls=[{"id": "1"}])]
    failed = {"id": "b4", "custom_id": "rows-4", "response": None, "error": {"code": "expired"}}
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(each) + "\n" for each in [*lines, failed]))
    items = [{"question": f"2+{n}?", "answer": f"#### {n}"} for n in (3, 4, 5, 6)]
    turns, drops, _ = read(tmp_path, *items, answers=str(answers))
    assert turns == [[(U, "2+3?"), (A, "5")]]
    assert drops.counts == {
        "an answer that was cut off (finish_reason: length)": 1,
        "a tool call that cannot be read": 1,
        "a request that failed (expired)": 1,
    }
