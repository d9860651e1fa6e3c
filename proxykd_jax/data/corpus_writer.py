"""Writes the tokenised corpus (``corpus.py``) so that a kill loses at most the open shards.

A shard's ArrayRecord file is committed first, then its part of the index; only then the shard
counts. Shards that a killed process did not finish are written again, with the same bytes.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import (
    complete_stage,
    digest_file,
    remove_leftovers,
    sync_folder,
    write_json,
)
from proxykd_jax.data.collate import count_earlier
from proxykd_jax.data.corpus import (
    EARLIER,
    EARLIER_LENGTHS,
    INDEX,
    SPLITS,
    TFDS_NAME,
    CorpusSplit,
    row_id_of,
    shard_name,
)
from proxykd_jax.data.example_codec import encode_example
from proxykd_jax.data.parts import Part, PartFolder
from proxykd_jax.errors import UserError
from proxykd_jax.texts.records import Drops, Notes

_VERSION = "1.0.0"
# One record per chunk, so a row can be read without unpacking its neighbours.
_WRITE_OPTIONS = "group_size:1"


class CorpusWriter:
    """Writes a corpus shard by shard into the folder of an open stage.

    The number of shards of a split is known only at the end, so ``finish`` gives shards their TFDS
    names.

    Args:
      folder: the stage's folder.
      one_of_several: other processes write shards there at the same time, so half-written files
        are kept.
    """

    def __init__(self, folder: Path, *, one_of_several: bool = False) -> None:
        self.folder = folder
        self._index = {
            split: PartFolder(folder / INDEX / split, one_of_several=one_of_several)
            for split in SPLITS
        }
        if not one_of_several:
            for place in (folder, *(part.folder for part in self._index.values())):
                remove_leftovers(place)
        self._done = {split: self._committed(split) for split in SPLITS}

    def _committed(self, split: CorpusSplit) -> set[int]:
        """The shards with an index and with records; those that have lost either are made again."""
        index, done = self._index[split], set()
        for shard in index.complete():
            working = self.working_name(split, shard)
            if working.exists() or any(self.folder.glob(f"{working.name}-of-*")):
                done.add(shard)
            else:
                index.path(shard).unlink(missing_ok=True)
        return done

    def has(self, split: CorpusSplit, shard: int) -> bool:
        """Whether a shard is committed."""
        return shard in self._done[split]

    def committed(self, split: CorpusSplit) -> list[int]:
        """Numbers of a split's committed shards, in order."""
        return sorted(self._done[split])

    def open_shard(self, split: CorpusSplit, shard: int) -> ShardWriter:
        """Starts a shard that is not committed yet."""
        return ShardWriter(self, split, shard)

    def working_name(self, split: str, shard: int) -> Path:
        """Path of a shard's records until ``finish``."""
        return self.folder / f"{TFDS_NAME}-{split}.array_record-{shard:05d}"

    def parts(self, split: CorpusSplit) -> list[Part]:
        """The committed index of a split, shard by shard."""
        return [self._index[split].open(shard) for shard in self.committed(split)]

    def commit_index(
        self,
        split: CorpusSplit,
        shard: int,
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, Any],
    ) -> None:
        """Commits the index of a shard whose records are on disk."""
        self._index[split].commit(shard, arrays, metadata)
        self._done[split].add(shard)

    def discard(self) -> None:
        """Removes everything but the manifest."""
        for split in SPLITS:
            for shard in self.committed(split):
                self.working_name(split, shard).unlink(missing_ok=True)
        shutil.rmtree(self.folder / INDEX, ignore_errors=True)
        self._done = {split: set() for split in SPLITS}

    def finish(self, counts: dict[str, Any], **extra: Any) -> None:
        """Names the shards, writes the files that TFDS reads, and completes the stage.

        Raises:
          UserError: a shard's records are missing.
        """
        num_shards = {split: len(self._done[split]) for split in SPLITS if self._done[split]}
        splits = []
        for split, number in num_shards.items():
            parts = self.parts(split)
            for shard in range(number):
                working, final = self.working_name(split, shard), shard_name(split, shard, number)
                if working.exists():
                    os.replace(working, self.folder / final)
                elif not (self.folder / final).exists():
                    raise UserError(f"{working} is missing; remove {self.folder} and run again.")
            splits.append(
                {
                    "name": split,
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "numBytes": str(sum(part.metadata["bytes"] for part in parts)),
                    "shardLengths": [str(len(part.arrays["lengths"])) for part in parts],
                }
            )
        sync_folder(self.folder)
        has_earlier = any(
            EARLIER_LENGTHS in part.arrays for split in num_shards for part in self.parts(split)
        )
        write_json(self.folder / "features.json", _features(has_earlier))
        write_json(
            self.folder / "dataset_info.json",
            {
                "name": TFDS_NAME,
                "version": _VERSION,
                "description": "Token rows: a prompt, then an answer with its end token.",
                "fileFormat": "array_record",
                "releaseNotes": {_VERSION: "tokens, prompt_length, row_id"},
                "splits": splits,
            },
        )
        complete_stage(self.folder, counts=counts, num_shards=num_shards, **extra)


class ShardWriter:
    """One shard during writing; it counts once ``commit`` is done."""

    def __init__(self, corpus: CorpusWriter, split: CorpusSplit, shard: int) -> None:
        from array_record.python import array_record_module

        self._corpus, self._split, self._shard = corpus, split, shard
        self._final = corpus.working_name(split, shard)
        # A unique name, because a scheduler may let two workers try the same shard.
        self._temporary = self._final.with_name(f".{self._final.name}.{secrets.token_hex(4)}.tmp")
        self._records = array_record_module.ArrayRecordWriter(str(self._temporary), _WRITE_OPTIONS)
        self._lengths: list[int] = []
        self._prompt_lengths: list[int] = []
        self._earlier_lengths: list[int] = []
        self._row_ids = bytearray()
        self._drops: dict[str, Drops] = {}
        self._notes: dict[str, Notes] = {}
        self._sources: dict[str, int] = {}

    def write(
        self,
        tokens: np.ndarray,
        prompt_length: int,
        source: str,
        earlier: np.ndarray | None = None,
    ) -> None:
        """Adds a row and counts it under ``source``; ``earlier`` as in ``TokenRow``."""
        row_id = row_id_of(tokens, prompt_length, earlier)
        example: dict[str, np.ndarray | bytes] = {
            "tokens": tokens,
            "prompt_length": np.array([prompt_length]),
            "row_id": row_id.encode(),
        }
        if earlier is not None and len(earlier):
            example[EARLIER] = earlier.reshape(-1)
        self._records.write(encode_example(example))
        self._earlier_lengths.append(count_earlier(earlier))
        self._lengths.append(len(tokens))
        self._prompt_lengths.append(prompt_length)
        self._row_ids += bytes.fromhex(row_id)
        self._sources[source] = self._sources.get(source, 0) + 1

    def drop(self, reason: str, origin: str, source: str) -> None:
        """Counts a row of this shard that is dropped."""
        self._drops.setdefault(source, Drops()).add(reason, origin)

    def note(self, note: str, origin: str, source: str) -> None:
        """Counts what a reader should know about a row of this shard."""
        self._notes.setdefault(source, Notes()).add(note, origin, "")

    def commit(self) -> None:
        """Makes the shard durable."""
        self._records.close()
        descriptor = os.open(self._temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self._temporary, self._final)
        sync_folder(self._final.parent)
        self._corpus.commit_index(
            self._split,
            self._shard,
            {
                "lengths": np.array(self._lengths, np.int32),
                "prompt_lengths": np.array(self._prompt_lengths, np.int32),
                "row_ids": np.frombuffer(bytes(self._row_ids), np.uint8).reshape(-1, 32),
                **(
                    {EARLIER_LENGTHS: np.array(self._earlier_lengths, np.int32)}
                    if any(self._earlier_lengths)
                    else {}
                ),
            },
            {
                "bytes": self._final.stat().st_size,
                "digest": digest_file(self._final),
                "drops": {source: drops.as_json() for source, drops in self._drops.items()},
                **(
                    {"notes": {source: n.as_json() for source, n in self._notes.items()}}
                    if self._notes
                    else {}
                ),
                "sources": self._sources,
            },
        )

    def abandon(self) -> None:
        """Discards the shard."""
        self._records.close()
        self._temporary.unlink(missing_ok=True)


def _tensor(kind: str, shape: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"tensorflow_datasets.core.features.{kind}",
        "tensor": {"shape": shape, "dtype": "int32", "encoding": "none"},
    }


def _features(has_earlier: bool) -> dict[str, Any]:
    tokens = _tensor("tensor_feature.Tensor", {"dimensions": ["-1"]})
    features = {
        "tokens": tokens,
        "prompt_length": _tensor("scalar.Scalar", {}),
        "row_id": {
            "pythonClassName": "tensorflow_datasets.core.features.text_feature.Text",
            "text": {},
        },
        **({EARLIER: tokens} if has_earlier else {}),
    }
    return {
        "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": {"features": features},
    }
