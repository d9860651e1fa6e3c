"""An exported folder asks the model as training did, and stops where its answers ended."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, Sample, sample
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.hf_weights import save_model
from proxykd_jax.models.params import init_params
from proxykd_jax.texts.records import Message, TextRow
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import load_tokenizer
from proxykd_jax.training.exported_tokenizer import changed_files
from tests.texts.conftest import CHATML, save_bpe, save_llama

NEW_TOKENS = 24
# Turns before the answer, with and without a system text and an earlier answer.
CONVERSATIONS = [
    [("user", "The cat sat on the mat.")],
    [("system", "Tell the truth."), ("user", "What is the capital of France?")],
    [("user", "Hello"), ("assistant", "A warm day."), ("user", "Write a story.")],
]


def tokenizer_folder(folder: Path, kind: str) -> Path:
    """A tokenizer like Llama's, or ChatML's whose EOS is not the token that ends a turn."""
    if kind == "llama":
        return save_llama(folder)
    save_bpe(folder, CHATML if kind == "chatml" else None)
    path = folder / "tokenizer_config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"eos_token": "<|endoftext|>"}))
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "top_p": 0.9}')
    return folder


CASES = {
    "its own template": ("chatml", "auto", None, "<|im_end|>"),
    "another template": ("chatml", "alpaca", None, "<|endoftext|>"),
    "another template and end": ("chatml", "alpaca", ["<|im_end|>"], "<|im_end|>"),
    "two ends": ("chatml", "auto", ["<|im_end|>", "<|endoftext|>"], "<|im_end|>"),
    "a built-in template where there is none": ("bare", "chatml", None, "<|im_end|>"),
    "plain": ("bare", "plain", None, "<|endoftext|>"),
    "llama2": ("llama", "llama2", None, "</s>"),
    "alpaca with a BOS": ("llama", "alpaca", None, "</s>"),
}


@pytest.mark.parametrize("kind, template, ends, end", CASES.values(), ids=CASES)
def test_transformers_asks_and_stops_as_training_did(tmp_path, kind, template, ends, end):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = tokenizer_folder(tmp_path / "tokenizer", kind)
    renderer = Renderer(load_tokenizer(source), template, ends)
    end_ids = renderer.end_token_ids
    size = renderer.tokenizer.vocab_size
    config = ModelConfig(
        "llama", size, 2, 32, 64, 4, 2, 8, eos_token_ids=end_ids, initializer_range=0.3
    )
    params = init_params(jax.random.key(0), config)
    rows = [
        TextRow(tuple(Message(*turn) for turn in turns), None, "a test") for turns in CONVERSATIONS
    ]
    prompts = [renderer.encode(row)[0] for row in rows]

    def answers(ends: tuple[int, ...]) -> list[Sample]:
        return sample(
            (params, None),
            [Prompt(prompt, str(i), NEW_TOKENS) for i, prompt in enumerate(prompts)],
            config=config,
            settings=DrawSettings(0.0, 1.0, size, ends),
            seed=0,
            round_index=0,
        )

    # The model says each end token where it would have said another token.
    for end_id, answer in zip(end_ids, answers(()), strict=False):
        said, kernel = int(answer.tokens[5]), params["lm_head"]["kernel"]
        swapped = kernel.at[:, end_id].set(kernel[:, said]).at[:, said].set(kernel[:, end_id])
        params["lm_head"]["kernel"] = swapped
    folder = tmp_path / "export"
    files = changed_files(renderer, end_ids, source)
    save_model(folder, config, params, source=source, texts=files)

    theirs = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert theirs.eos_token == end
    for turns, prompt in zip(CONVERSATIONS, prompts, strict=True):
        asked = theirs.apply_chat_template(
            [{"role": role, "content": text} for role, text in turns],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert asked == prompt.tolist()
    ours = answers(end_ids)
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
        assert out[0, len(prompt) :].tolist() == answer.tokens.tolist()
    assert any(answer.finished for answer in ours)


def test_a_folder_that_says_everything_right_stays_as_it_is(tmp_path):
    for number, template in enumerate((CHATML, None)):
        source = save_bpe(tmp_path / str(number), template)
        renderer = Renderer(load_tokenizer(source), "auto", None)
        assert changed_files(renderer, renderer.end_token_ids, source) == {}
