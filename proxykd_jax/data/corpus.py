"""The tokenised corpus on disk: TFDS's ArrayRecord layout, and an index that opens quickly.

``tfds.builder_from_directory(<run>/corpus)`` can read the folder. This module reads it without
TensorFlow, by row number. It keeps only two lengths per row in memory, and no tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import numpy as np

from proxykd_jax.artifacts import finished_manifest, stage_identity
from proxykd_jax.config import Config
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.data.example_codec import decode_example
from proxykd_jax.data.parts import PartFolder
from proxykd_jax.errors import UserError

CorpusSplit = Literal["warmup", "align", "distill", "validation", "test", "fresh"]
SPLITS: tuple[CorpusSplit, ...] = get_args(CorpusSplit)
TFDS_NAME = "proxykd_corpus"
INDEX = "index"
# In examples and in the index, only where earlier turns are in the loss.
EARLIER, EARLIER_LENGTHS = "earlier_answers", "earlier_lengths"
# Keys that do not change the corpus: one selects rows for later stages, the other says how the work
# is done.
_LICENSES = {"__all__": {"license"}}
_NOT_CONTENT: dict[str, Any] = {
    "validation_max_rows": True, "beam": True,
    "sources": _LICENSES, "fresh_prompts": _LICENSES, "test": _LICENSES,
}  # fmt: skip
_READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def corpus_settings(config: Config) -> dict[str, Any]:
    """The keys that determine a corpus."""
    return {"corpus": config.corpus.model_dump(mode="json", exclude=_NOT_CONTENT)}


def row_id_of(tokens: np.ndarray, prompt_length: int, earlier: np.ndarray | None = None) -> str:
    """sha256 in hex of the token ids as little-endian int32, then the prompt's length.

    Stretches of the prompt that are in the loss (int32[n, 2]) follow.
    """
    state = hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes())
    state.update(np.array([prompt_length], "<i4").tobytes())
    if earlier is not None and len(earlier):
        state.update(np.ascontiguousarray(earlier, "<i4").tobytes())
    return state.hexdigest()


def shard_name(split: str, shard: int, num_shards: int) -> str:
    """The file name of a shard, as in TFDS."""
    return f"{TFDS_NAME}-{split}.array_record-{shard:05d}-of-{num_shards:05d}"


def open_corpus(folder: Path | str) -> TokenCorpus:
    """Opens the corpus that ``prepare`` made.

    Raises:
      UserError: it is missing, incomplete or damaged.
    """
    folder = Path(folder)
    return TokenCorpus(folder, finished_manifest(folder, "prepare", "corpus"))


class TokenCorpus:
    """A tokenised corpus.

    Attributes:
      folder: its location.
      tokenizer_path: folder or hub name of the tokenizer.
      tokenizer_digest: digest of the tokenizer's files.
      vocab_size: number of the tokenizer's ids; a model's rows beyond it are never sampled.
      end_token_ids: tokens that end an answer; the first is the one that gets appended.
      max_length: tokens of the longest row allowed.
      counts: the manifest's counts of rows read, dropped and kept.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.tokenizer_path: str = manifest["tokenizer"]["path"]
        self.tokenizer_digest: str = manifest["tokenizer"]["digest"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.end_token_ids: tuple[int, ...] = tuple(manifest["end_token_ids"])
        self.max_length: int = manifest["settings"]["corpus"]["max_length"]
        self.counts: dict[str, Any] = manifest["counts"]

    @property
    def identity(self) -> str:
        """Identity that a later stage records as its input."""
        return stage_identity(self.folder)

    def split(self, name: str) -> TokenSplit:
        """A split of the corpus; it may be empty.

        Raises:
          ValueError: no split has this name.
        """
        if name not in SPLITS:
            raise ValueError(f"No split is called {name!r}; there are {', '.join(SPLITS)}.")
        return TokenSplit(self.folder, name, self.manifest["num_shards"].get(name, 0))


class TokenSplit:
    """Rows of one split of the corpus, by number.

    Attributes:
      name: name of the split.
      lengths: int32[n], tokens of each row.
      prompt_lengths: int32[n], tokens of each prompt.
      earlier_lengths: int32[n], tokens of each prompt that are in the loss.
      row_ids: the ids in hex, by number.
    """

    def __init__(self, folder: Path, name: str, num_shards: int) -> None:
        self.name = name
        self._files = [folder / shard_name(name, j, num_shards) for j in range(num_shards)]
        index = PartFolder(folder / INDEX / name)
        parts = [index.open(j).arrays for j in range(num_shards)]
        self.lengths = _joined([part["lengths"] for part in parts], np.int32)
        self.prompt_lengths = _joined([part["prompt_lengths"] for part in parts], np.int32)
        self.earlier_lengths = _joined([earlier_lengths(part) for part in parts], np.int32)
        self._starts = np.cumsum([0, *(len(part["lengths"]) for part in parts)])
        self.row_ids = RowIds([part["row_ids"] for part in parts], self._starts)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, indices: Iterable[int]) -> list[TokenRow]:
        """Reads rows by number, in the given order. Safe to call from several threads.

        Raises:
          IndexError: there is no such row.
          UserError: a file is missing or has changed since it was written.
        """
        wanted = np.fromiter(indices, np.int64)
        if np.any((wanted < 0) | (wanted >= len(self))):
            raise IndexError(f"split {self.name!r} has {len(self)} rows, asked for {wanted}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        rows: list[TokenRow | None] = [None] * len(wanted)
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            for place, data in zip(places, self._records(shard, wanted[places]), strict=True):
                rows[place] = self._row(int(wanted[place]), data, self._files[shard])
        return [row for row in rows if row is not None]

    def __iter__(self) -> Iterator[TokenRow]:
        for start in range(0, len(self), 256):
            yield from self.read(range(start, min(start + 256, len(self))))

    def _records(self, shard: int, wanted: np.ndarray) -> list[bytes]:
        path = self._files[shard]
        try:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = _open_reader(path)
                reader = self._readers[shard]
            return reader.read((wanted - self._starts[shard]).tolist())
        except (ValueError, IndexError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(_damaged(path, reason)) from error

    def _row(self, number: int, data: bytes, path: Path) -> TokenRow:
        try:
            example = decode_example(data)
            tokens = np.asarray(example["tokens"]).astype(np.int32)
            prompt_length = int(np.asarray(example["prompt_length"])[0])
            earlier = _earlier_of(example)
        except (ValueError, KeyError, IndexError) as error:
            raise UserError(_damaged(path, f"row {number} cannot be decoded")) from error
        row_id = self.row_ids[number]
        if row_id_of(tokens, prompt_length, earlier) != row_id:
            raise UserError(_damaged(path, f"row {number} is not the row of the index"))
        return TokenRow(tokens, prompt_length, row_id, earlier)


class RowIds(Sequence[str]):
    """Row ids by number, stored as 32 bytes each in memory-mapped files."""

    def __init__(self, parts: Sequence[np.ndarray], starts: np.ndarray) -> None:
        self._parts = parts
        self._starts = starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._parts[shard][number - self._starts[shard]].tobytes().hex()


def earlier_lengths(index: Mapping[str, np.ndarray]) -> np.ndarray:
    """int32[n] of a shard's index: tokens of each prompt that are in the loss."""
    found = index.get(EARLIER_LENGTHS)
    return np.zeros(len(index["lengths"]), np.int32) if found is None else found


def _earlier_of(example: Mapping[str, Any]) -> np.ndarray | None:
    if EARLIER not in example:
        return None
    return np.asarray(example[EARLIER]).astype(np.int32).reshape(-1, 2)


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype)


def _open_reader(path: Path) -> Any:
    from array_record.python import array_record_module

    if not path.is_file():
        raise UserError(f"{path} is missing; remove the folder {path.parent} to make it again.")
    return array_record_module.ArrayRecordReader(str(path), _READ_OPTIONS)


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged ({what}); remove the folder {path.parent} to make it again."
