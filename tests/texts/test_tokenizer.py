"""Tokenizers: conventions, digests, error messages, and whether two are the same."""

import json
import re
import shutil

import numpy as np
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.texts.tokenizer import (
    check_embedding_rows,
    check_same_vocabulary,
    load_tokenizer,
    vocabulary_difference,
)


def test_conventions(bpe_folder, llama_folder):
    bpe, llama = load_tokenizer(bpe_folder), load_tokenizer(llama_folder)
    assert (bpe.bos_id, bpe.eos_id, bpe.adds_bos) == (1, 2, False)
    assert (llama.bos_id, llama.eos_id, llama.adds_bos) == (1, 2, True)
    assert "<|im_start|>" in bpe.chat_template and llama.chat_template is None
    assert llama.vocab_size == 400
    for tokenizer in (bpe, llama):
        tokens = tokenizer.encode("The cat, über alles 🙂")
        assert tokens.dtype == np.int32 and tokenizer.bos_id not in tokens
        assert tokenizer.decode(tokens) == "The cat, über alles 🙂"


def test_agrees_with_transformers(bpe_folder, llama_folder):
    from transformers import AutoTokenizer

    for folder in (bpe_folder, llama_folder):
        theirs = AutoTokenizer.from_pretrained(folder)
        ours = load_tokenizer(folder)
        text = "Once upon a time there was a </s> <|im_end|> robot."
        assert ours.encode(text).tolist() == theirs.encode(text, add_special_tokens=False)


def test_tokenizer_json_alone(llama_folder, tmp_path):
    shutil.copy(llama_folder / "tokenizer.json", tmp_path)
    alone = load_tokenizer(tmp_path)
    assert alone.eos_id is None and not alone.adds_bos
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 7]}))
    named = load_tokenizer(tmp_path)
    assert (named.bos_id, named.eos_id, named.adds_bos) == (1, 2, True)
    assert (
        named.encode("The dog").tolist() == load_tokenizer(llama_folder).encode("The dog").tolist()
    )


def test_digest_follows_the_files(bpe_folder, tmp_path):
    shutil.copytree(bpe_folder, tmp_path / "a")
    same = load_tokenizer(tmp_path / "a").digest
    assert same == load_tokenizer(bpe_folder).digest
    (tmp_path / "a" / "model.safetensors").write_bytes(b"no part of the tokenizer")
    assert load_tokenizer(tmp_path / "a").digest == same
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    config["chat_template"] += " "
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path / "a").digest != same


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "absent", "no such folder"),
        (lambda path: path, "holds no tokenizer"),
        (lambda path: _write(path / "tokenizer.json", "{"), "cannot be read"),
        (lambda path: _write(path / "tokenizer.json", "{").parent / "tokenizer.json", "is a file"),
    ],
)
def test_what_is_wrong_is_a_sentence(tmp_path, make, message):
    place = make(tmp_path)
    place = place.parent if place.name == "tokenizer.json" and message != "is a file" else place
    with pytest.raises(UserError, match=message):
        load_tokenizer(place)


def test_an_id_far_beyond_all_others_is_refused(tmp_path, bpe_folder):
    folder = tmp_path / "gap"
    shutil.copytree(bpe_folder, folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["gap"] = 10**7 + 1  # the library allocates all ids up to it
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="ids up to 10000001"):
        load_tokenizer(folder)


def _write(path, text):
    path.write_text(text)
    return path


def test_hub_name_without_a_connection(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub"):
        load_tokenizer("somebody/some-model")


def test_same_vocabulary(bpe_folder, llama_folder, tmp_path):
    bpe, llama = load_tokenizer(bpe_folder), load_tokenizer(llama_folder)
    assert vocabulary_difference(bpe, load_tokenizer(bpe_folder)) is None
    check_same_vocabulary(bpe, bpe)
    with pytest.raises(UserError, match="share one vocabulary"):
        check_same_vocabulary(bpe, llama)
    # Two tokens change places, which the sizes of the vocabularies do not show.
    shutil.copytree(bpe_folder, tmp_path / "b")
    data = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(data))
    difference = vocabulary_difference(bpe, load_tokenizer(tmp_path / "b"))
    assert difference.startswith("2 tokens have other ids") and "'A' is id" in difference


def test_embedding_rows(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    check_embedding_rows(tokenizer, tokenizer.vocab_size, "the proxy")
    check_embedding_rows(tokenizer, tokenizer.vocab_size + 60, "the proxy")
    last = re.escape(repr(tokenizer.backend.id_to_token(tokenizer.vocab_size - 1)))
    with pytest.raises(UserError, match=f"{last} has no row.*belongs to another model"):
        check_embedding_rows(tokenizer, tokenizer.vocab_size - 1, "the proxy")
    with pytest.raises(UserError, match="and others have no row"):
        check_embedding_rows(tokenizer, tokenizer.vocab_size - 9, "the proxy")


def test_tokens_by_name(bpe_folder):
    tokenizer = load_tokenizer(bpe_folder)
    assert tokenizer.token_id("<|im_end|>") == tokenizer.token_id(2) == 2
    for token in (10_000, -1, "<|nothing|>"):
        with pytest.raises(UserError, match=r"corpus\.end_tokens"):
            tokenizer.token_id(token)


def test_real_tokenizers(assets):
    llama = load_tokenizer(assets / "tokenizers" / "llama2")
    smol = load_tokenizer(assets / "tokenizers" / "smollm2")
    stories = load_tokenizer(assets / "models" / "stories260K")
    assert (llama.vocab_size, smol.vocab_size, stories.vocab_size) == (32000, 49152, 512)
    assert (llama.adds_bos, smol.adds_bos, stories.adds_bos) == (True, False, True)
    assert llama.encode("Hello there").tolist() == [15043, 727]
    with pytest.raises(UserError, match="tokens have other ids"):
        check_same_vocabulary(llama, stories)
