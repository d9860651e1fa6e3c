"""Benchmark files, and a model that accepts any prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.tasks.files import write

CHOICES = [{"text": text, "label": label} for text, label in zip(["ice", "fog"], "AB", strict=True)]


@pytest.fixture
def benchmarks(tmp_path: Path) -> dict[str, str]:
    """Files with five items of GSM8K, three of CSQA, and four of two BBH sub-tasks."""
    bbh = tmp_path / "bbh"
    bbh.mkdir()
    for name, target in (("navigate", "Yes"), ("counting", "3")):
        examples = [{"input": f"{name} {n}?", "target": target} for n in range(2)]
        (bbh / f"{name}.json").write_text(json.dumps({"examples": examples}))
    question = {"stem": "What is cold?", "question_concept": "cold", "choices": CHOICES}
    return {
        "gsm8k": write(
            tmp_path / "gsm8k.jsonl",
            [{"question": f"What is {n} + {n}?", "answer": f"#### {2 * n}"} for n in range(5)],
        ),
        "csqa": write(
            tmp_path / "csqa.jsonl",
            [{"id": f"c{n}", "answerKey": "A", "question": question} for n in range(3)],
        ),
        "bbh": str(bbh),
    }


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose tokens are bytes, so that it accepts any prompt."""
    import jax
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from proxykd_jax.models.config import ModelConfig
    from proxykd_jax.models.hf_weights import save_model
    from proxykd_jax.models.params import init_params

    folder = tmp_path_factory.mktemp("byte_model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"</s>": 0} | {sign: number for number, sign in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    source = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(source / "tokenizer.json"))
    keys = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(keys))
    config = ModelConfig(
        family="llama", vocab_size=len(vocabulary), num_layers=1, model_dim=16, ffn_dim=16,
        num_heads=2, num_kv_heads=1, head_dim=8, max_positions=384, initializer_range=0.3,
        eos_token_ids=(0,),
    )  # fmt: skip
    save_model(folder, config, init_params(jax.random.key(1), config), source=source)
    return folder
