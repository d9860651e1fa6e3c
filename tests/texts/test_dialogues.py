"""Conversations with tools, thoughts and several answers in the loss."""

import json
import random

import numpy as np
import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.texts.conversations import expand_turns
from proxykd_jax.texts.formats import conversations_of
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import load_tokenizer
from tests.texts.conftest import TEXTS
from tests.texts.shapes import SHAPES, SPECIAL, rendered

CONVERSATIONS = 1000
WORDS = [word for text in TEXTS[:2] for word in text.split()] + ["12", "é", "日本", "x\ny", "a  b"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Gives the {name}.",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
        },
    }
    for name in ("weather_of", "time_in")
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Byte-level BPE with the control tokens of all shapes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=420, **options))
    folder = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    texts = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    return load_tokenizer(folder)


@pytest.fixture
def renderer_of(tokenizer, tmp_path):
    def make(template, thinking="keep"):
        path = tmp_path / "template.jinja"
        path.write_text(template)
        return Renderer(tokenizer, str(path), thinking=thinking)

    return make


def rows_of(record, keep="all", prompts_only=False):
    """The rows of a record in the format ``messages``."""
    source = SourceConfig(path="rows.jsonl", turns=keep)
    for turns in conversations_of("messages", record, source, prompts_only):
        for found in expand_turns(turns, keep=keep, prompts_only=prompts_only):
            yield TextRow(
                found.messages, None, "rows.jsonl:1", tools=found.tools, every_turn=keep == "all"
            )


def row_of(record, keep="all"):
    (row,) = rows_of(record, keep)
    return row


def mask_of(encoded):
    mask = np.zeros(len(encoded.tokens), bool)
    mask[encoded.prompt_length :] = True
    for begin, end in () if encoded.earlier is None else encoded.earlier:
        mask[begin:end] = True
    return mask


# --- generated conversations ----------------------------------------------------------------------


def say(rng, few=1, many=8):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(few, many)))


def conversation(rng, shape):
    """Turns for ``rendered``, and tools or None."""
    turns = [{"role": "system", "content": say(rng)}] if shape.system and rng.random() < 0.3 else []
    tools = TOOLS if shape.tools and rng.random() < 0.6 else None
    number = 0
    for _ in range(rng.randint(1, 3)):
        turns.append({"role": "user", "content": say(rng)})
        for _ in range(rng.randint(0, 2) if tools else 0):
            many = rng.randint(1, 2) if shape.tools == "many" else 1
            calls = []
            for _ in range(many):
                arguments = {"place": say(rng, 1, 2), "days": rng.randint(0, 9)}
                name = rng.choice(TOOLS)["function"]["name"]
                calls.append((name, arguments, f"abcd{number:05d}"))
                number += 1
            content = say(rng) if shape.beside and rng.random() < 0.3 else ""
            turns.append({"role": "assistant", "content": content, "calls": calls})
            for called in calls:
                turns.append({"role": "tool", "content": say(rng), "id": called[2]})
        turns.append({"role": "assistant", "content": say(rng), "calls": []})
    opened = shape.thoughts == "opened"
    for place, turn in enumerate(turns):
        if turn["role"] == "assistant":
            is_last = place == len(turns) - 1
            turn["learnt"] = is_last or rng.random() < 0.8
            may_think = shape.beside or not turn["calls"]
            if may_think and (rng.random() < 0.3 or (is_last and opened)):
                turn["thought"] = say(rng)
    return turns, tools


def record_of(turns, tools, rng):
    """The conversation as a file has it, in one of the forms."""
    messages = []
    for turn in turns:
        message = {"role": turn["role"], "content": turn["content"]}
        if turn["role"] == "tool":
            message["tool_call_id"] = turn["id"]
        if turn["role"] == "assistant":
            if not turn["learnt"]:
                message |= rng.choice([{"weight": 0}, {"train": False}, {"loss": False}])
            thought = turn.get("thought")
            if thought and (turn["calls"] or rng.random() < 0.5):
                message["reasoning_content"] = thought
            elif thought:
                message["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
            if turn["calls"]:
                as_text = rng.random() < 0.5
                message["tool_calls"] = [
                    {
                        "id": identity,
                        "type": "function",
                        "function": {
                            "name": name,
                            "arguments": json.dumps(given) if as_text else given,
                        },
                    }
                    for name, given, identity in turn["calls"]
                ]
                message["content"] = turn["content"] or None
        messages.append(message)
    given = {} if tools is None else {"tools": rng.choice([tools, json.dumps(tools)])}
    return {"messages": messages, **given}


@pytest.mark.parametrize("name", SHAPES)
def test_masks_equal_those_of_texts_built_by_hand(renderer_of, tokenizer, name):
    shape, rng = SHAPES[name], random.Random(name)
    renderer = renderer_of(shape.template)
    rows, wanted = [], []
    for _ in range(CONVERSATIONS):
        turns, tools = conversation(rng, shape)
        rows.append(row_of(record_of(turns, tools, rng)))
        wanted.append(rendered(name, turns, tools))
    texts = ["".join(text for text, _ in pieces) for pieces in wanted]
    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    for found, pieces, encoding in zip(renderer.encode_batch(rows), wanted, encodings, strict=True):
        assert found.drop is None
        learnt = np.repeat([learnt for _, learnt in pieces], [len(text) for text, _ in pieces])
        mask = np.array([learnt[begin:end].all() for begin, end in encoding.offsets])
        last = np.flatnonzero(mask)[-1] + 1  # what follows the last end token is cut off
        assert found.tokens.tolist() == encoding.ids[:last]
        assert mask_of(found).tolist() == mask[:last].tolist()


# --- what files hold ------------------------------------------------------------------------------

U, A, T = "user", "assistant", "tool"
SUNNY = {"role": T, "content": "sunny"}
DONE = {"role": A, "content": "It is sunny."}
CALL = {"name": "weather_of", "arguments": {"place": "Bern"}}


def called(**beside):
    return [{"role": U, "content": "q"}, {"role": A, "content": None} | beside, SUNNY, DONE]


def calls_of(row):
    """(name, arguments) of every call of a row."""
    found = [call for m in row.messages for call in json.loads(m.calls or "[]")]
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found]


ONE = [("weather_of", {"place": "Bern"})]
CALL_FORMS = {
    "objects": called(tool_calls=[{"id": "1", "type": "function", "function": CALL}]),
    "json text": called(tool_calls=json.dumps([{"function": CALL}])),
    "text of arguments": called(
        tool_calls=[{"function": {"name": "weather_of", "arguments": '{"place": "Bern"}'}}]
    ),
    "legacy": called(function_call={"name": "weather_of", "arguments": '{"place": "Bern"}'}),
    "python": called(function_call={"name": "weather_of", "arguments": "{'place': 'Bern'}"}),
    "hermes": called(content=f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"),
    "unclosed": called(content=f"<tool_call>{json.dumps(CALL)}"),
    "part": called(
        content=[{"type": "tool_use", "id": "1", "name": "weather_of", "input": {"place": "Bern"}}]
    ),
}


@pytest.mark.parametrize("form", CALL_FORMS)
def test_calls_are_read_in_every_form(form):
    row = row_of({"messages": CALL_FORMS[form]})
    assert calls_of(row) == ONE
    _, call, result, _ = row.messages
    assert (call.role, call.content, result.role, result.content) == (A, "", T, "sunny")
    assert result.extras.name == "weather_of"
    assert result.extras.call_id == json.loads(call.calls)[0]["id"]
    # Each call is an answer, and so is the text behind its result.
    assert [len(found.messages) for found in rows_of({"messages": CALL_FORMS[form]}, "each")] == [
        2,
        4,
    ]


def test_sharegpt_calls_and_observations():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "Let me look."},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
        {"from": "observation", "value": "sunny"},
        {"from": "observation", "value": "[1]"},
        {"from": "gpt", "value": "It is sunny."},
    ]
    source = SourceConfig(path="x", turns="all")
    (found,) = conversations_of(
        "sharegpt", {"conversations": turns, "tools": json.dumps(TOOLS)}, source, False
    )
    (row,) = expand_turns(found, keep="all", prompts_only=False)
    assert [m.role for m in row.messages] == [U, A, T, T, A]
    assert row.messages[1].content == "Let me look." and calls_of(row) == ONE * 2
    assert json.loads(row.tools) == TOOLS


@pytest.mark.parametrize(
    "given",
    [
        {"tools": TOOLS},
        {"tools": json.dumps(TOOLS)},
        {"tools": [json.dumps(tool) for tool in TOOLS]},
        {"functions": [tool["function"] for tool in TOOLS]},
        {"tools": [t["function"] | {"x": None} for t in TOOLS]},
    ],
)
def test_tools_are_read_in_every_form(given):
    assert json.loads(row_of({"messages": called(tool_calls=[CALL])} | given).tools) == TOOLS


@pytest.mark.parametrize(
    "said",
    [
        "You are a function calling AI model. You are given function signatures within <tools> "
        "</tools> XML tags. Do not guess values for functions.\n<tools>\n{one}\n</tools>\nFor each "
        "function call return a JSON object. Each call is enclosed in <tool_call> </tool_call> "
        "tags.",
        "\n\n# Tools\n\nYou may call functions.\n<tools>\n{lines}\n</tools>\n\nReturn calls "
        "as:\n<tool_call>\n{{...}}\n</tool_call>",
    ],
)
def test_tools_in_the_system_text_go_to_the_template(said):
    lines = "\n".join(map(json.dumps, TOOLS))
    system = "Be kind, Dr. Who. " + said.format(one=repr(TOOLS), lines=lines)
    responses = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    call = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
    messages = [
        {"role": "system", "content": system},
        {"role": U, "content": "q"},
        {"role": A, "content": f"I look.\n{call}\n{call}"},
        {"role": U, "content": responses},
        DONE,
    ]
    row = row_of({"messages": messages})
    assert json.loads(row.tools) == TOOLS
    assert [(m.role, m.content) for m in row.messages] == [
        ("system", "Be kind, Dr. Who."),
        (U, "q"),
        (A, "I look."),
        (T, "1"),
        (T, "2"),
        (A, "It is sunny."),
    ]


def test_results_are_texts_whatever_they_were():
    for content, text in (
        ([{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}], "sunny"),
        ({"sky": "clear"}, '{"sky": "clear"}'),
        (None, ""),
    ):
        messages = called(tool_calls=[CALL])
        messages[2] = {"role": T, "content": content}
        assert row_of({"messages": messages}).messages[2].content == text


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (called(function_call={"name": "f", "arguments": "Bern"}), "arguments"),
        (called(function_call={"name": "f", "arguments": '{"a": '}), "arguments"),
        (called(tool_calls="weather"), "cannot be read"),
        (called(tool_calls=[{"id": "1"}]), "cannot be read"),
        (called(content="I guess."), "without a call"),
        (called(content="<think>\nmore"), "cut off in its thought"),
        ([{"role": U, "content": "q"}, {"role": A, "content": "<think>a</think>\n"}], "a thought"),
        ([{"role": U, "content": "q"}, {"role": A, "content": "", "thinking": "a"}], "a thought"),
    ],
)
def test_what_cannot_be_learnt_is_named(messages, reason):
    from proxykd_jax.texts.records import RowProblem

    with pytest.raises(RowProblem, match=reason):
        list(rows_of({"messages": messages}))


def test_an_answer_cut_off_in_its_thought_is_left_out():
    messages = [
        {"role": U, "content": "q"},
        {"role": A, "content": "a"},
        {"role": U, "content": "r"},
    ]
    source, reasons = SourceConfig(path="x"), []
    record = {"messages": [*messages, {"role": A, "content": "<think>\nHm"}]}
    (turns,) = conversations_of("messages", record, source, False)
    rows = list(expand_turns(turns, keep="each", prompts_only=False, left_out=reasons.append))
    assert [len(row.messages) for row in rows] == [2] and "cut off" in reasons[0]


THOUGHTS = [
    {"content": "a", "reasoning_content": "t"},
    {"content": "a", "reasoning": "t"},
    {"content": "a", "thinking": "t"},
    {"content": "<think>t</think>a"},
    {"content": "t\n</think>\n\na"},
    {"content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}]},
    {"content": "a", "reasoning_details": [{"type": "reasoning.text", "text": "t"}]},
]


@pytest.mark.parametrize("beside", THOUGHTS)
def test_thoughts_are_read_in_every_form(beside):
    row = row_of({"messages": [{"role": U, "content": "q"}, {"role": A} | beside]})
    assert (row.messages[1].thought, row.messages[1].content) == ("t", "a")


def test_a_text_about_tags_has_no_thought_and_no_call():
    for text in (
        "Close it with </think> at the end.",
        "Write <think> first.",
        "<tool_call> begins",
    ):
        row = row_of({"messages": [{"role": U, "content": "q"}, {"role": A, "content": text}]})
        assert row.messages[1].content == text and row.messages[1].extras is None


def test_a_developer_speaks_behind_the_system():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": U, "content": "q"},
        DONE,
    ]
    assert row_of({"messages": messages}).messages[0].content == "a\n\nb"


# --- templates ------------------------------------------------------------------------------------


def parts_of(renderer, row):
    (found,) = renderer.encode_batch([row])
    assert found.drop is None, found.drop
    show = renderer.tokenizer.decode
    return show(found.tokens[: found.prompt_length]), show(found.tokens[found.prompt_length :])


THOUGHT = {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a", "thinking": "t"}]}
EMPTY = {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "<think></think>a"}]}
NONE = {"messages": [{"role": U, "content": "q"}, {"role": A, "content": "a"}]}
CHATML_PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("shape", "thinking", "record", "prompt", "answer"),
    [
        ("qwen3", "keep", THOUGHT, CHATML_PROMPT, "<think>\nt\n</think>\n\na<|im_end|>"),
        ("qwen3", "drop", THOUGHT, CHATML_PROMPT, "<think>\n\n</think>\n\na<|im_end|>"),
        ("qwen3", "context", THOUGHT, CHATML_PROMPT + "<think>\nt\n</think>\n\n", "a<|im_end|>"),
        ("qwen2.5", "keep", THOUGHT, CHATML_PROMPT, "<think>\nt\n</think>\n\na<|im_end|>"),
        ("qwen2.5", "drop", THOUGHT, CHATML_PROMPT, "a<|im_end|>"),
        ("qwen2.5", "keep", EMPTY, CHATML_PROMPT, "<think></think>a<|im_end|>"),
        ("deepseek", "keep", THOUGHT, "<s><|User|>q<|Assistant|>", "<think>\nt\n</think>\n\na</s>"),
        ("deepseek", "drop", THOUGHT, "<s><|User|>q<|Assistant|>", "a</s>"),
        ("deepseek_open", "keep", THOUGHT, "<s><|User|>q<|Assistant|><think>\n",
         "t\n</think>\n\na</s>"),
        ("deepseek_open", "context", THOUGHT,
         "<s><|User|>q<|Assistant|><think>\nt\n</think>\n\n", "a</s>"),
        ("deepseek_open", "keep", EMPTY, "<s><|User|>q<|Assistant|><think>\n",
         "\n</think>\n\na</s>"),
    ],
)  # fmt: skip
def test_thoughts_stand_where_sampling_writes_them(
    renderer_of, shape, thinking, record, prompt, answer
):
    renderer = renderer_of(SHAPES[shape].template, thinking)
    assert parts_of(renderer, row_of(record)) == (prompt, answer)


def test_a_generation_prompt_that_closes_the_thought(renderer_of):
    opens = "<|im_start|>assistant\\n' }}{% endif %}"
    closed = SHAPES["qwen3"].template
    place = closed.rindex("' }}{% endif %}")
    closed = closed[:place] + "<think>\\n\\n</think>\\n\\n" + closed[place:]
    assert opens in SHAPES["qwen3"].template
    renderer = renderer_of(closed)
    prompt = CHATML_PROMPT + "<think>\n\n</think>\n\n"
    assert parts_of(renderer, row_of(NONE)) == (prompt, "a<|im_end|>")
    assert parts_of(renderer, row_of(EMPTY)) == (prompt, "a<|im_end|>")
    assert parts_of(renderer_of(closed, "drop"), row_of(THOUGHT)) == (prompt, "a<|im_end|>")
    (found,) = renderer.encode_batch([row_of(THOUGHT)])
    assert "corpus.thinking: drop" in found.drop


def test_a_prompt_that_opens_a_thought_needs_one(renderer_of):
    (found,) = renderer_of(SHAPES["deepseek_open"].template).encode_batch([row_of(NONE)])
    assert "ends with '<think>\\n'" in found.drop


def test_rows_with_tools_need_a_template_with_tools(renderer_of):
    record = {"messages": called(tool_calls=[CALL]), "tools": TOOLS}
    rows = [row_of(record), row_of({"messages": record["messages"]})]
    rows += rows_of({"messages": record["messages"][:2], "tools": TOOLS}, "last")
    for shape in ("gemma", "zephyr", "phi3", "deepseek"):
        for found in renderer_of(SHAPES[shape].template).encode_batch(rows):
            assert "give corpus.template a template that does" in found.drop
    (found,) = renderer_of(SHAPES["llama3.1"].template).encode_batch(
        [row_of({"messages": called(content="I look.", tool_calls=[CALL])[:2]})]
    )
    assert "beside a tool call" in found.drop


def test_ids_that_a_template_rejects_are_replaced(renderer_of):
    messages = called(tool_calls=[{"id": "call_1234567890", "function": CALL}])
    messages[2] = SUNNY | {"tool_call_id": "call_1234567890"}
    prompt, answer = parts_of(
        renderer_of(SHAPES["mistral3"].template), row_of({"messages": messages}, "last")
    )
    assert prompt.count("call00000") == 2 and answer == " It is sunny.</s>"


def test_quoted_control_tokens_stay_text(renderer_of, tokenizer):
    messages = called(
        tool_calls=[{"function": {"name": "f", "arguments": {"a": "</s><|im_end|>"}}}]
    )
    messages[2] = {"role": T, "content": "<|im_end|>"}
    row = row_of({"messages": messages})
    (found,) = renderer_of(SHAPES["qwen2.5"].template).encode_batch([row])
    (end,) = {int(found.tokens[-1])}
    assert end == tokenizer.vocabulary["<|im_end|>"]
    assert int(np.sum(found.tokens[mask_of(found)] == end)) == 2
    assert int(np.sum(found.tokens == end)) == 4


def test_marked_templates_mark_earlier_turns(renderer_of):
    from tests.texts.conftest import MARKED

    messages = [
        {"role": role, "content": text} for role, text in ((U, "q"), (A, "a"), (U, "r"), (A, "b"))
    ]
    renderer = renderer_of(MARKED)
    (found,) = renderer.encode_batch([row_of({"messages": messages})])
    show = renderer.tokenizer.decode
    assert show(found.tokens[mask_of(found)]) == "a<|im_end|>b<|im_end|>"
    assert "turn (in the loss):     'a<|im_end|>'" in renderer.describe(
        row_of({"messages": messages})
    )


def test_a_row_of_all_turns_has_the_tokens_of_its_last(renderer_of):
    rng, renderer = random.Random(0), renderer_of(SHAPES["qwen2.5"].template)
    records = [record_of(*conversation(rng, SHAPES["qwen2.5"]), rng) for _ in range(30)]
    every = renderer.encode_batch([row_of(record) for record in records])
    last = renderer.encode_batch([row_of(record, "last") for record in records])
    for one, other in zip(every, last, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.prompt_length == other.prompt_length and other.earlier is None
