"""Conversations with tools, thoughts and several answers in the loss."""

import json
import random

import numpy as np
import pytest

from proxykd_jax.config.schema import SourceConfig
from proxykd_jax.errors import UserError
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
    for found, pieces, encoding in zip(
        renderer.encode_batch(rows), wanted, encodings, strict=True
    ):
        assert found.drop is None
        learnt = np.repeat([learnt for _, learnt in pieces], [len(text) for text, _ in pieces])
        mask = np.array([learnt[begin:end].all() for begin, end in encoding.offsets])
        last = np.flatnonzero(mask)[-1] + 1  # what follows the last end token is cut off
        assert found.tokens.tolist() == encoding.ids[:last]
        assert mask_of(found).tolist() == mask[:last].tolist()
