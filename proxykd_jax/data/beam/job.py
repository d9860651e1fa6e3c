"""What all workers know of a corpus that is being made, in a folder that all of them see."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import read_json, write_bytes, write_json
from proxykd_jax.config import CorpusConfig, SourceConfig
from proxykd_jax.data.contamination import ContaminationIndex
from proxykd_jax.data.parts import Part, PartFolder
from proxykd_jax.data.readers import source_pieces
from proxykd_jax.data.records import TextRow
from proxykd_jax.data.selection import SourceCount, read_rows, source_changed, source_label
from proxykd_jax.data.template import Renderer
from proxykd_jax.data.tokenizer import load_tokenizer
from proxykd_jax.errors import UserError

GROUPS = ("test", "sources", "fresh_prompts")  # in the order in which they are read
FOR_ALL = -1  # the number under which an error of every piece is noted
_JOB = "job.json"


@dataclass(frozen=True)
class Piece:
    """What one worker reads at a time: a file of a source, or a source that is no list of files.

    Attributes:
      group: the key of the config that lists its source, one of ``GROUPS``.
      index: the source's place in that list.
      label: the source's, for counts.
      source: the piece as a source of its own.
    """

    group: str
    index: int
    label: str
    source: SourceConfig


class Job:
    """A corpus that is being made.

    Args:
      folder: where ``begin_job`` was.

    Attributes:
      corpus: the section of the config.
      corpus_folder: of the open stage.
      pieces: all of them, in reading order; steps name them by their numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        record = read_json(folder / _JOB)
        self.corpus = CorpusConfig.model_validate_json(json.dumps(record["corpus"]))
        self.corpus_folder = Path(record["corpus_folder"])
        self.pieces = tuple(
            Piece(
                piece["group"],
                piece["index"],
                piece["label"],
                SourceConfig.model_validate_json(json.dumps(piece["source"])),
            )
            for piece in record["pieces"]
        )
        self._tokenizer: str = record["tokenizer"]
        self._lock = threading.Lock()

    # Made once a process, whose threads share them.

    @property
    def renderer(self) -> Renderer:
        with self._lock:
            return self._made_renderer

    @property
    def benchmarks(self) -> ContaminationIndex | None:
        """The questions to look for, or None.

        Raises:
          UserError: a file of theirs cannot be read.
        """
        with self._lock:
            return self._made_benchmarks

    @functools.cached_property
    def _made_renderer(self) -> Renderer:
        tokenizer = load_tokenizer(self._tokenizer)
        return Renderer(tokenizer, self.corpus.template, self.corpus.end_tokens)

    @functools.cached_property
    def _made_benchmarks(self) -> ContaminationIndex | None:
        files = self.corpus.benchmarks
        return ContaminationIndex.from_files(files) if files else None

    def numbers(self, *groups: str) -> list[int]:
        """The pieces of some groups."""
        return [number for number, piece in enumerate(self.pieces) if piece.group in groups]

    # --- rows -------------------------------------------------------------------------------------

    def rows(self, number: int, count: SourceCount) -> Iterator[TextRow]:
        """The rows of a piece; fills ``count``."""
        piece = self.pieces[number]
        return read_rows(
            piece.group, piece.index, piece.source, count, self.renderer, is_piece=True
        )

    def rows_again(self, number: int, rows: int) -> Iterator[TextRow]:
        """The rows of a piece that had so many.

        Raises:
          UserError: it has more or fewer.
        """
        found = 0
        for row in self.rows(number, SourceCount()):
            found += 1
            if found > rows:
                break
            yield row
        if found != rows:
            raise source_changed()

    # --- columns ----------------------------------------------------------------------------------

    def commit(
        self,
        step: str,
        number: int,
        arrays: Mapping[str, np.ndarray],
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Keeps what a step found of a piece."""
        folder = PartFolder(self.folder / step, one_of_several=True)
        folder.commit(number, arrays, metadata)

    def found(self, step: str, number: int) -> Part:
        """What a step found of a piece: arrays and metadata."""
        return PartFolder(self.folder / step).open(number)

    # --- errors -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def notes_errors(self, step: str, number: int) -> Iterator[None]:
        """Keeps a mistake of the user's for the leading process, to be said as it stands.

        Beam would retry it, and wrap its sentence into tracebacks.
        """
        try:
            yield
        except UserError as error:
            text = json.dumps({"error": str(error)})
            path = self._error_path(step, number)
            write_bytes(path, text.encode(), one_of_several=True)

    def noted_error(self, step: str, number: int) -> UserError | None:
        """The error of a piece, if it had one."""
        path = self._error_path(step, number)
        return UserError(read_json(path)["error"]) if path.exists() else None

    def has_error(self, step: str, before: int | None = None) -> bool:
        """Whether a piece had an error (one read before this piece: what follows is in vain)."""
        noted = (int(path.stem) for path in self._error_path(step, 0).parent.glob("[!.]*.json"))
        return any(before is None or number < before for number in noted)

    def _error_path(self, step: str, number: int) -> Path:
        return self.folder / "errors" / step / f"{number}.json"


def begin_job(folder: Path, corpus: CorpusConfig, tokenizer: str, corpus_folder: Path) -> Job:
    """Lists the pieces of a corpus and writes what workers need into an empty folder.

    Args:
      folder: for the columns; every worker sees it under this name.
      corpus: the section of the config.
      tokenizer: folder or hub name.
      corpus_folder: of the open stage.

    Raises:
      UserError: a path names nothing.
    """
    pieces = []
    for group in GROUPS:
        sources: Sequence[SourceConfig] = getattr(corpus, group)
        for index, source in enumerate(sources):
            label = source_label(group, index, source)
            for piece in source_pieces(source):
                kept = {"group": group, "index": index, "label": label}
                pieces.append(kept | {"source": piece.model_dump(mode="json")})
    record = {
        "corpus": corpus.model_dump(mode="json"),
        "tokenizer": tokenizer,
        "corpus_folder": str(corpus_folder),
        "pieces": pieces,
    }
    write_json(folder / _JOB, record)
    return Job(folder)


_lock = threading.Lock()


def job_in(folder: str) -> Job:
    """The job of a folder, on a worker: threads of one process share its tokenizer."""
    with _lock:
        return _read_job(folder)


@functools.lru_cache(maxsize=1)
def _read_job(folder: str) -> Job:
    return Job(Path(folder))
