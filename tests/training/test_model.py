"""Models of a run: their tokenizers are compared before anything is trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from proxykd_jax.config import make_config
from proxykd_jax.errors import UserError
from proxykd_jax.training.model import check_tokenizers

from .conftest import tiny_config


def _folder(path, words, rows=8):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    record = tiny_config().to_hf()
    (path / "config.json").write_text(json.dumps({**record, "vocab_size": rows}))
    return str(path)


def _config(proxy: str, student: str, alpha: float):
    return make_config(
        {
            "preset": "paper",
            "name": "t",
            "corpus": {"sources": [{"path": "x.jsonl"}]},
            "proxy": {"path": proxy},
            "student": {"path": student},
            "distill": {"alpha": alpha},
        }
    )


def test_another_vocabulary_is_refused_before_training(tmp_path) -> None:
    proxy = _folder(tmp_path / "proxy", ["<unk>", "a", "b"])
    same = _folder(tmp_path / "same", ["<unk>", "a", "b"])
    other = _folder(tmp_path / "other", ["<unk>", "b", "a"])
    corpus = SimpleNamespace(tokenizer_path=proxy)
    check_tokenizers(_config(proxy, same, 100.0), corpus)
    with pytest.raises(UserError, match="must share one vocabulary"):
        check_tokenizers(_config(proxy, other, 100.0), corpus)
    small = _folder(tmp_path / "small", ["<unk>", "a", "b"], rows=2)
    with pytest.raises(UserError, match="belongs to another model"):
        check_tokenizers(_config(proxy, small, 100.0), corpus)
    # Plain fine-tuning uses no proxy, whatever the key names.
    check_tokenizers(_config(other, same, 0.0), corpus)
