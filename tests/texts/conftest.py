"""Generated tokenizers: byte-level BPE without a BOS, and one like Llama's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

TEXTS = [
    "The cat sat on the mat and looked at the dog. It was a warm day.",
    "Once upon a time there was a little girl. She liked to play in the garden.",
    "What is the capital of France? The capital of France is Paris.",
    "Write a short story about a robot. [INST] ### Instruction: ### Response:",
] * 3

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_bpe(folder: Path, chat_template: str | None = CHATML, vocab_size: int = 400) -> Path:
    """Saves byte-level BPE with ChatML tokens and EOS ``<|im_end|>``; it adds no token itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return _save(
        tokenizer,
        folder,
        {
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
            "unk_token": "<|endoftext|>",
            "chat_template": chat_template,
        },
    )


def save_llama(folder: Path, vocab_size: int = 400) -> Path:
    """Saves BPE with byte fallback, which marks words with ``▁`` and adds ``<s>`` by itself."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in TEXTS], trainer)
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in special
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _save(
        tokenizer,
        folder,
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "add_bos_token": True,
            "add_eos_token": False,
        },
    )


def _save(tokenizer, folder: Path, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {key: value for key, value in config.items() if value is not None}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template."""
    return save_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="session")
def marked_folder(tmp_path_factory) -> Path:
    """The same tokenizer with a template that marks the answer with ``{% generation %}``."""
    return save_bpe(tmp_path_factory.mktemp("marked"), MARKED)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tokenizer like Llama's, without a template."""
    return save_llama(tmp_path_factory.mktemp("llama"))
