"""State of a corpus in the making, in a folder that all workers see."""

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
from proxykd_jax.data.parts import Part, PartFolder
from proxykd_jax.errors import UserError
from proxykd_jax.texts.contamination import ContaminationIndex
from proxykd_jax.texts.readers import source_pieces
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.selection import SourceCount, read_rows, source_changed, source_label
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.tokenizer import load_tokenizer

GROUPS = ("test", "sources", "fresh_prompts")  # in the order in which they are read
FOR_ALL = -1  # the number for an error that affects every piece
_JOB = "job.json"


@dataclass(frozen=True)
class Piece:
    """The unit that one worker reads: a file of a source, or a source that is not a list of files.

    Attributes:
      group: the config key that lists its source, one of ``GROUPS``.
      index: the source's index in that list.
      label: the source's label, for counts.
      source: the piece as a separate source.
    """

    group: str
    index: int
    label: str
    source: SourceConfig


class Job:
    """A corpus in the making.

    Args:
      folder: the folder given to ``begin_job``.

    Attributes:
      corpus: the section of the config.
      corpus_folder: folder of the open stage.
      pieces: all pieces, in reading order; steps refer to them by number.
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

    # Made once per process and shared by its threads.

    @property
    def renderer(self) -> Renderer:
        with self._lock:
            return self._made_renderer

    @property
    def benchmarks(self) -> ContaminationIndex | None:
        """The questions to search for, or None.

        Raises:
          UserError: one of their files cannot be read.
        """
        with self._lock:
            return self._made_benchmarks

    @functools.cached_property
    def _made_renderer(self) -> Renderer:
        return Renderer.of(load_tokenizer(self._tokenizer), self.corpus)

    @functools.cached_property
    def _made_benchmarks(self) -> ContaminationIndex | None:
        files = self.corpus.benchmarks
        return ContaminationIndex.from_files(files) if files else None

    def numbers(self, *groups: str) -> list[int]:
        """Numbers of the pieces of these groups."""
        return [number for number, piece in enumerate(self.pieces) if piece.group in groups]

    # --- rows -------------------------------------------------------------------------------------

    def rows(self, number: int, count: SourceCount) -> Iterator[TextRow]:
        """The rows of a piece; fills ``count``."""
        piece = self.pieces[number]
        return read_rows(
            piece.group, piece.index, piece.source, count, self.renderer, is_piece=True
        )

    def rows_again(self, number: int, rows: int) -> Iterator[TextRow]:
        """The rows of a piece that had this many rows.

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
        """Stores what a step found for a piece."""
        folder = PartFolder(self.folder / step, one_of_several=True)
        folder.commit(number, arrays, metadata)

    def found(self, step: str, number: int) -> Part:
        """What a step found for a piece: arrays and metadata."""
        return PartFolder(self.folder / step).open(number)

    # --- errors -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def notes_errors(self, step: str, number: int) -> Iterator[None]:
        """Stores a UserError, so that the leading process can report it unchanged.

        Beam would retry it and bury the message in tracebacks.
        """
        try:
            yield
        except UserError as error:
            text = json.dumps({"error": str(error)})
            path = self._error_path(step, number)
            write_bytes(path, text.encode(), one_of_several=True)

    def noted_error(self, step: str, number: int) -> UserError | None:
        """The error of a piece, or None."""
        path = self._error_path(step, number)
        return UserError(read_json(path)["error"]) if path.exists() else None

    def has_error(self, step: str, before: int | None = None) -> bool:
        """Whether a piece had an error (if given, a piece before ``before``)."""
        noted = (int(path.stem) for path in self._error_path(step, 0).parent.glob("[!.]*.json"))
        return any(before is None or number < before for number in noted)

    def _error_path(self, step: str, number: int) -> Path:
        return self.folder / "errors" / step / f"{number}.json"


def begin_job(folder: Path, corpus: CorpusConfig, tokenizer: str, corpus_folder: Path) -> Job:
    """Lists the pieces of a corpus and writes what workers need into an empty folder.

    Args:
      folder: folder for the columns; every worker sees it under this path.
      corpus: the section of the config.
      tokenizer: folder or hub name.
      corpus_folder: folder of the open stage.

    Raises:
      UserError: a path matches nothing.
    """
    pieces = []
    for group in GROUPS:
        sources: Sequence[SourceConfig] = getattr(corpus, group)
        for index, source in enumerate(sources):
            label = source_label(group, index, source)
            for piece in source_pieces(source, held_out=group == "test"):
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
    """The job of a folder, on a worker; threads of one process share its tokenizer."""
    with _lock:
        return _read_job(folder)


@functools.lru_cache(maxsize=1)
def _read_job(folder: str) -> Job:
    return Job(Path(folder))
