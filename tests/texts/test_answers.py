"""Answers from the outputs of batches, for the inputs of batches and for prompts with ids."""

import json

import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, Notes


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(prompts_only=False, **keys):
    drops, notes = Drops(), Notes()
    source = SourceConfig(**keys)
    rows = list(read_source(source, prompts_only=prompts_only, drops=drops, notes=notes))
    return [[(m.role[0], m.content) for m in row.messages] for row in rows], drops, notes


def openai(message, finish="stop", status=200):
    body = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
    return {"id": "batch_req_1", "response": {"status_code": status, "body": body}, "error": None}


def failed(code):
    return {"id": "batch_req_1", "response": None, "error": {"code": code, "message": "m"}}


def anthropic(content, stop="end_turn"):
    message = {"role": "assistant", "content": content, "stop_reason": stop, "model": "c"}
    return {"result": {"type": "succeeded", "message": message}}


TEXT = [{"type": "text", "text": "a"}]
ERROR = {"type": "error", "error": {"type": "invalid_request_error", "message": "m"}}
OUTPUTS = {
    "openai": (openai({"role": "assistant", "content": "a"}), None),
    "openai cut": (
        openai({"content": "a"}, "length"), "an answer that was cut off (finish_reason: length)",
    ),
    "openai refused": (
        openai({"content": None, "refusal": "No."}),
        "a request that failed or was refused (refusal)",
    ),
    "openai filtered": (
        openai({"content": ""}, "content_filter"),
        "an answer that was filtered (finish_reason: content_filter)",
    ),
    "openai failed": (failed("batch_expired"), "a request that failed (batch_expired)"),
    "openai status": (openai({}, status=429), "a request that failed (status 429)"),
    "openai empty": (
        {"response": {"status_code": 200, "body": {"choices": []}}},
        "a request that failed (no answer came)",
    ),
    "anthropic": (anthropic(TEXT), None),
    "anthropic stop": (anthropic(TEXT, "stop_sequence"), None),
    "anthropic parts": (
        anthropic([{"type": "thinking", "thinking": "t"}, *TEXT]), None,
    ),
    "anthropic cut": (
        anthropic(TEXT, "max_tokens"), "an answer that was cut off (stop_reason: max_tokens)",
    ),
    "anthropic refused": (
        anthropic([], "refusal"), "an answer that was filtered (stop_reason: refusal)",
    ),
    "anthropic errored": (
        {"result": {"type": "errored", "error": ERROR}}, "a request that failed (errored)",
    ),
    "anthropic expired": ({"result": {"type": "expired"}}, "a request that failed (expired)"),
    "anthropic canceled": ({"result": {"type": "canceled"}}, "a request that failed (canceled)"),
    "plain": ({"response": "a"}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", OUTPUTS)
def test_outputs(tmp_path, case):
    """What failed is counted by its reason; another answer with the same id is read."""
    line, reason = OUTPUTS[case]
    user = {"role": "user", "content": "q"}
    asked = [{"custom_id": n, "body": {"model": "m", "messages": [user]}} for n in ("1", "2")]
    path = write(tmp_path / "a.jsonl", asked)
    lines = [{**line, "custom_id": "1"}, {**OUTPUTS["anthropic"][0], "custom_id": "2"}]
    found, drops, notes = read(path=path, answers=write(tmp_path / "out.jsonl", lines))
    row = [("u", "q"), ("a", "a")]
    assert found == ([row, row] if reason is None else [row])
    assert drops.as_json() == (
        {} if reason is None else {reason: {"count": 1, "first": [f"{path}:1"]}}
    )
    assert not notes.counts


SHOTS = [
    {"role": "user", "content": "p"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "q"},
]
INPUTS = {
    "openai": (
        {"method": "POST", "url": "/v1/chat/completions",
         "body": {"model": "m", "messages": [{"role": "system", "content": "s"}, *SHOTS]}},
    ),
    "anthropic": ({"params": {"model": "m", "max_tokens": 9, "system": "s", "messages": SHOTS}},),
    "anthropic parts": (
        {"params": {"system": [{"type": "text", "text": "s"}], "stop_sequences": ["x"],
                    "messages": [*SHOTS[:2], {"role": "user",
                                              "content": [{"type": "text", "text": "q"}]}]}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("turns", ["each", "last", "all"])
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(tmp_path, case, turns):
    """A request is one prompt; the answers that it shows are context and not the teacher's."""
    path = write(tmp_path / "in.jsonl", [{"custom_id": "1", **INPUTS[case][0]}])
    expected = [("s", "s"), ("u", "p"), ("a", "b"), ("u", "q")]
    assert read(True, path=path, turns=turns)[0] == [expected]
    answers = write(tmp_path / "out.jsonl", [{"custom_id": "1", **anthropic(TEXT)}])
    found, drops, notes = read(path=path, answers=answers, turns=turns)
    assert (found, drops.total, notes.counts) == ([[*expected, ("a", "a")]], 0, {})
    source = SourceConfig(path=path, answers=answers, turns="all")
    (row,) = read_source(source, prompts_only=False, drops=Drops())
    assert [m.learnt for m in row.messages if m.role == "assistant"] == [False, True]
    with pytest.raises(UserError, match="Name the file of answers"):
        read(path=path)


def test_answers_of_another_model_than_the_teacher(tmp_path):
    asked = [{"custom_id": f"{n}", "params": {"messages": SHOTS[:1]}} for n in range(3)]
    lines = [
        {"custom_id": "0", **anthropic(TEXT)},
        {"custom_id": "1", "response": "a", "model": "m"},
        {"custom_id": "2", "response": "a"},
    ]
    path, answers = write(tmp_path / "in.jsonl", asked), write(tmp_path / "out.jsonl", lines)
    assert len(read(path=path, answers=answers)[0]) == 3
    found, drops, _ = read(path=path, answers=answers, teacher="c")
    assert len(found) == 2 and drops.counts == {"an answer of another model (m)": 1}


def test_a_request_that_begins_the_answer(tmp_path):
    rows = [{"custom_id": n, "params": {"messages": SHOTS[:end]}} for n, end in ((1, 2), (2, 3))]
    found, drops, _ = read(True, path=write(tmp_path / "in.jsonl", rows))
    assert len(found) == 1 and drops.counts == {"a request that begins the answer itself": 1}


def test_prompts_with_ids_or_texts_get_their_answers(tmp_path):
    rows = [{"qid": n, "q": q} for n, q in ((7, "x"), (8, "y"), (9, "z"))]
    rows.append({"qid": 7, "q": "w", "response": "own"})
    path = write(tmp_path / "a.jsonl", rows)
    answers = [{"id": "7", "response": "a", "remark": "r"}, {"prompt": "z", "response": "b"}]
    found, drops, notes = read(
        path=path,
        columns={"prompt": "q", "id": "qid"},
        answers=write(tmp_path / "b.jsonl", answers),
    )
    assert found == [[("u", "x"), ("a", "a")], [("u", "z"), ("a", "b")]]
    assert drops.counts == {
        "no answer of the teacher": 1,
        "a row with an answer of its own beside the file of answers": 1,
    }
    assert notes.counts == {"the key answers.remark is not read": 1}


def test_conversations_with_role_and_content(tmp_path):
    turns = [*SHOTS, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", [{"conversations": turns}])
    found, drops, notes = read(path=path, turns="last")
    assert found == [[("u", "p"), ("a", "b"), ("u", "q"), ("a", "a")]]
    assert not drops.total and not notes.counts
