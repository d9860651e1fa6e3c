"""Loads tokenizers from a folder or the hub, finds their conventions, and compares them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import digest_file, digest_value
from proxykd_jax.config import Config
from proxykd_jax.errors import UserError
from proxykd_jax.models.folder import TOKENIZER_FILES, local_folder
from proxykd_jax.small_files import read_object

_MOST_IDS = 10_000_000  # the largest vocabularies have 300,000
# Files that name end tokens; the first is the one that generation follows.
_MODEL_CONFIGS = ("generation_config.json", "config.json")


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the properties that other modules need.

    Attributes:
      path: folder or hub name.
      digest: digest of its files.
      backend: ``tokenizers.Tokenizer`` without padding and truncation.
      special_texts: names of special tokens (``bos_token`` ...) to their texts, for templates.
      bos_id, eos_id: None if there is none.
      eos_ids: every id that ends a text: ``eos_id``, then the others of the list
        ``eos_token_id`` in the folder's ``generation_config.json`` or ``config.json``.
      adds_bos: whether it starts a text with its BOS token by itself.
      chat_template: Jinja text, or None.
    """

    path: str
    digest: str
    backend: Any
    special_texts: Mapping[str, str]
    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    adds_bos: bool
    chat_template: str | None
    _vocabulary: dict[str, int] = field(repr=False, compare=False)

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """Token to id, added tokens included."""
        return self._vocabulary

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model may have more rows; they are never sampled."""
        return max(self._vocabulary.values()) + 1

    def encode(self, text: str) -> np.ndarray:
        """int32[T]: the tokens of a text, with nothing added."""
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int] | np.ndarray, *, skip_special: bool = False) -> str:
        """The text of tokens."""
        return self.backend.decode([int(t) for t in tokens], skip_special_tokens=skip_special)

    def token_id(self, token: int | str) -> int:
        """The id of a token given by id or text.

        Raises:
          UserError: there is no such token.
        """
        if isinstance(token, int):
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"corpus.end_tokens: {token} is not an id of the tokenizer {self.path}, which "
                    f"has {self.vocab_size}."
                )
            return token
        if token not in self._vocabulary:
            raise UserError(f"corpus.end_tokens: the tokenizer {self.path} has no token {token!r}.")
        return self._vocabulary[token]


def tokenizer_place(config: Config) -> str:
    """The location of a run's tokenizer: the key ``tokenizer``, or the proxy's folder."""
    if config.tokenizer:
        return config.tokenizer
    if config.proxy.path:
        return config.proxy.path
    if config.proxy.init is None:
        raise ValueError("A checked config names the proxy's path or init.")
    return config.proxy.init.path


def load_tokenizer(place: Config | str | Path) -> Tokenizer:
    """Loads a tokenizer.

    Args:
      place: a run's config, a local folder, or a name on the hub.

    Raises:
      UserError: there is no tokenizer there, or it cannot be read.
    """
    place = tokenizer_place(place) if isinstance(place, Config) else str(place)
    folder = local_folder(place, (*TOKENIZER_FILES, *_MODEL_CONFIGS))
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not any(file.name in ("tokenizer.json", "tokenizer.model", "vocab.json") for file in files):
        raise UserError(
            f"{place} holds no tokenizer: tokenizer.json is missing. Name a folder that has one "
            "with the key tokenizer."
        )
    try:
        if (folder / "tokenizer_config.json").is_file():
            loaded = _with_transformers(folder)
        else:
            loaded = _from_json_alone(folder)
    except UserError:
        raise
    except Exception as error:  # on a broken file the loaders raise many kinds of exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The tokenizer in {place} cannot be read: {reason}") from error
    backend, special_texts, chat_template = loaded
    vocabulary = backend.get_vocab(with_added_tokens=True)
    largest = max(vocabulary.values(), default=-1)
    if not 0 <= largest < _MOST_IDS:
        raise UserError(
            f"The tokenizer in {place} has {len(vocabulary)} tokens, with ids up to {largest}. Ids "
            f"must be below {_MOST_IDS:,}, because a model has an embedding for each."
        )
    ids = {name: vocabulary.get(text) for name, text in special_texts.items()}
    bos_id = ids.get("bos_token")
    begun = backend.encode("a").ids
    return Tokenizer(
        path=place,
        digest=digest_value({file.name: digest_file(file) for file in files}),
        backend=backend,
        special_texts=special_texts,
        bos_id=bos_id,
        eos_id=ids.get("eos_token"),
        eos_ids=_eos_ids(folder, ids.get("eos_token"), vocabulary.values()),
        adds_bos=bos_id is not None and bool(begun) and begun[0] == bos_id,
        chat_template=chat_template,
        _vocabulary=vocabulary,
    )


def _eos_ids(folder: Path, eos_id: int | None, known: Collection[int]) -> tuple[int, ...]:
    found = [] if eos_id is None else [eos_id]
    for name in _MODEL_CONFIGS:
        ids = _model_config(folder, name).get("eos_token_id")
        if isinstance(ids, list):
            found += [i for i in ids if type(i) is int and i in known]
            break
    return tuple(dict.fromkeys(found))


def _model_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        return {}
    return read_object(path, "model's config")


def check_same_vocabulary(first: Tokenizer, second: Tokenizer) -> None:
    """Checks that corpus, proxy and student give token ids the same meaning, as soft labels need.

    Raises:
      UserError: the maps from tokens to ids differ; the message names the first differences.
    """
    difference = vocabulary_difference(first, second)
    if difference:
        raise UserError(
            f"The tokenizers of {first.path} and {second.path} differ: {difference}. Soft labels "
            "are token ids, so corpus, proxy and student must share one vocabulary; choose models "
            "of one family."
        )


def vocabulary_difference(a: Tokenizer, b: Tokenizer, *, shown: int = 3) -> str | None:
    """How two maps from tokens to ids differ, or None if they do not."""
    left, right = a.vocabulary, b.vocabulary
    if left == right:
        return None
    other = {t: (left.get(t), right.get(t)) for t in left.keys() | right.keys()}
    differing = sorted(
        (
            (min(i for i in ids if i is not None), token)
            for token, ids in other.items()
            if ids[0] != ids[1]
        ),
    )
    listed = "; ".join(
        f"{token!r} is {_id_text(other[token][0])} in the first and {_id_text(other[token][1])} "
        "in the second"
        for _, token in differing[:shown]
    )
    return f"{len(differing)} tokens have other ids ({listed})"


def check_embedding_rows(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Checks that a model has an embedding for every id. Extra rows are padding, never sampled.

    Raises:
      UserError: there are fewer rows than ids.
    """
    if rows < tokenizer.vocab_size:
        beyond = range(rows, tokenizer.vocab_size)
        named = ", ".join(repr(tokenizer.backend.id_to_token(i)) for i in beyond[:3])
        raise UserError(
            f"{model} has {rows} embedding rows, but the tokenizer {tokenizer.path} has "
            f"{tokenizer.vocab_size} ids: {named}{' and others' if len(beyond) > 3 else ''} "
            f"{'has' if len(beyond) == 1 else 'have'} no row. Either tokens were added to the "
            "tokenizer and not to the model, or it belongs to another model."
        )


def _id_text(token_id: int | None) -> str:
    return "absent" if token_id is None else f"id {token_id}"


_Loaded = tuple[Any, dict[str, str], str | None]


def _with_transformers(folder: Path) -> _Loaded:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
    )
    if not tokenizer.is_fast:
        raise UserError(f"{folder} has no fast tokenizer (tokenizer.json), which is needed.")
    texts = {
        name: str(text)
        for name, text in tokenizer.special_tokens_map.items()
        if isinstance(text, str)
    }
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return _plain_backend(tokenizer.backend_tokenizer.to_str()), texts, template


def _from_json_alone(folder: Path) -> _Loaded:
    """A folder with only tokenizer.json; BOS and EOS are the ids in the model's config."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer_config.json.")
    backend = _plain_backend(path.read_text(encoding="utf-8"))
    texts: dict[str, str] = {}
    for name in reversed(_MODEL_CONFIGS):
        config = _model_config(folder, name)
        for key in ("bos_token", "eos_token", "pad_token"):
            ids = config.get(f"{key}_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            token = backend.id_to_token(first) if isinstance(first, int) else None
            if token is not None:
                texts.setdefault(key, token)
    template_file = folder / "chat_template.jinja"
    template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
    return backend, texts, template


def _plain_backend(text: str) -> Any:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    return backend
