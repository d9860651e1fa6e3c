"""Prompts of plain texts: the split depends on the prompt alone."""

import random

import numpy as np
import pytest

from proxykd_jax.config import SourceConfig
from proxykd_jax.texts.contamination import ContaminationIndex
from proxykd_jax.texts.dedup import Deduplicator, PromptSet
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.text_prompts import sentence_end, with_prompts
from proxykd_jax.texts.tokenizer import load_tokenizer

OPTIONS = [{}, {"prompt_sentences": 2}, {"prompt_tokens": 1}, {"prompt_tokens": 6}]
# Letters of one to four bytes that share bytes, closing marks, and control tokens.
PIECES = [
    *("The cat", "sat", " on", "é", "è", "🙂", "🙃", "猫", "犬", "。", "！", "”", '"', ")", "..."),
    *(". ", ". ", "! ", "?", "\n", " ", "<s>", "</s>", "<|im_end|>", "A", "a"),
]


@pytest.fixture(scope="module", params=["llama_folder", "bpe_folder"])
def renderer(request):
    return Renderer(load_tokenizer(request.getfixturevalue(request.param)), "plain")


def source(**keys):
    return SourceConfig(path="x", **keys)


def rows_of(texts, renderer, **keys):
    rows = [TextRow((), text, f"f:{i}") for i, text in enumerate(texts)]
    return list(with_prompts(iter(rows), source(**keys), renderer))


def random_texts(count, seed=0):
    """Random texts; half of them share a beginning of random length with the text before."""
    draw = random.Random(seed)
    texts = ["The cat sat."]
    while len(texts) < count:
        rest = "".join(draw.choices(PIECES, k=draw.randint(3, 12)))
        begin = texts[-1][: draw.randint(0, len(texts[-1]))] if draw.random() < 0.5 else ""
        texts.append(begin + rest)
    return [text for text in texts if not text.isspace()]


@pytest.mark.parametrize("keys", OPTIONS)
def test_one_prompt_has_one_key(renderer, keys):
    """Texts whose prompts have the same tokens go to the same split, whatever follows."""
    texts = random_texts(3000)
    rows = rows_of(texts, renderer, **keys)
    assert [row.text for row in rows] == texts
    encoded = renderer.encode_batch(rows, source(**keys), prompts_only=True)
    keys_of = {}
    for row, (tokens, *_) in zip(rows, encoded, strict=True):
        keys_of.setdefault(tuple(tokens.tolist()), set()).add(row.first_user_message)
    assert len(keys_of) < len(rows)  # some prompts do repeat
    assert {len(found) for found in keys_of.values()} == {1}


@pytest.mark.parametrize("keys", OPTIONS)
def test_the_key_does_not_depend_on_the_other_texts(renderer, keys):
    texts = random_texts(600, seed=1)
    keys_of = {row.text: row.first_user_message for row in rows_of(texts, renderer, **keys)}
    shuffled = random.Random(2).sample(texts, 150)
    for row in rows_of(shuffled, renderer, **keys):
        assert row.first_user_message == keys_of[row.text]


def test_a_prompt_that_ends_within_a_letter(renderer):
    """Both letters share their first three bytes, and either may be the last of the prompt."""
    smile, upside = rows_of(["🙂 yes. No.", "🙃 yes. No."], renderer, prompt_tokens=3)
    tokens = renderer.encode_batch([smile, upside], source(prompt_tokens=3), prompts_only=True)
    assert np.array_equal(tokens[0].tokens, tokens[1].tokens)
    assert smile.first_user_message == upside.first_user_message


def test_the_prompt_is_what_the_model_is_given(renderer):
    text = "The Cat sat. It was  a warm day. The dog looked."
    (row,) = rows_of([text], renderer)
    assert row.prompt == "The Cat sat." and row.first_user_message == "the cat sat."
    (row,) = rows_of([text], renderer, prompt_sentences=2)
    assert row.first_user_message == "the cat sat. it was a warm day."
    (row,) = rows_of([text], renderer, prompt_tokens=7)
    tokens = renderer.tokenizer.encode(text)
    assert row.prompt == renderer.tokenizer.decode(tokens[:7])
    assert text.startswith(row.prompt) and row.prompt != text
    # If the whole text is the prompt, the text is its own key.
    for keys in ({"prompt_sentences": 9}, {"prompt_tokens": 99}):
        (row,) = rows_of([text], renderer, **keys)
        assert row.prompt == text


def test_conversations_and_damaged_texts_stay_as_they_are(renderer):
    chat = TextRow((Message("user", "Hi. You."), Message("assistant", "yes")), None, "f:1")
    reserved = TextRow((), "a \U00108000 b", "f:2")
    text = TextRow((), "The cat sat.", "f:3")
    for keys in OPTIONS:
        found = list(with_prompts(iter([chat, reserved, text, chat]), source(**keys), renderer))
        assert found[0] == found[3] == chat and found[1].text == reserved.text
        assert found[2].prompt


def test_a_conversation_and_a_text_of_one_prompt_share_a_key(renderer):
    chat = TextRow((Message("user", "the CAT sat."), Message("assistant", "yes")), None, "f:1")
    (row,) = rows_of(["The cat sat. It was warm."], renderer)
    assert row.first_user_message == chat.first_user_message
    assert row in PromptSet([chat]) and chat in PromptSet([row])


def test_held_out_texts_are_found_however_they_are_cut(renderer):
    text = "The cat sat. It was warm."
    held_out = PromptSet(rows_of([text], renderer))
    same_prompt, same_text, other = (
        rows_of(["The cat sat. A dog ran."], renderer)[0],
        rows_of([text.upper()], renderer, prompt_tokens=2)[0],
        rows_of(["The dog sat. It was warm."], renderer)[0],
    )
    assert same_prompt in held_out and same_text in held_out and other not in held_out


def test_benchmarks_are_looked_for_in_the_prompt_as_well(renderer):
    index = ContaminationIndex(["What is gravity?"])
    (row,) = rows_of(["What is gravity? It pulls the cat down."], renderer)
    match = index.match(row)
    assert match is not None and match.how == "whole"


def test_as_a_prompt_alone_a_text_is_cut(renderer):
    first, second = rows_of(["The cat sat. One end.", "The cat sat. Another."], renderer)
    seen = Deduplicator()
    assert seen.is_new(first) and seen.is_new(second)
    seen = Deduplicator()
    assert seen.is_new(first.without_answer) and not seen.is_new(second.without_answer)
    chat = TextRow((Message("user", "Hi."),), None, "f:1")
    assert chat.without_answer == chat


def test_sentence_end():
    assert sentence_end("One. Two.", 1) == 4
    assert sentence_end("One. Two.", 2) == 9
    assert sentence_end("One. Two.", 3) is None
    assert sentence_end("v1.5 is out", 1) is None
    assert sentence_end('"Go!" he said.', 1) == 5
    assert sentence_end("猫がいる。犬もいる。", 1) == 5
