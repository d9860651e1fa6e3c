"""Tokenises selected rows in batches and writes them to shards; each split has one open shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from proxykd_jax.data.corpus import SPLITS, CorpusSplit
from proxykd_jax.data.corpus_writer import CorpusWriter, ShardWriter
from proxykd_jax.texts.row_limit import length_problem
from proxykd_jax.texts.selection import SelectedRow
from proxykd_jax.texts.template import Encoded, Renderer

# Enough rows to make the tokenizer's threads worth starting, few enough to fit in memory.
BATCH_ROWS = 512
_Place = tuple[SelectedRow, int]  # a row and the shard it belongs to


def encode_rows(
    rows: Iterator[SelectedRow],
    renderer: Renderer,
    writer: CorpusWriter,
    *,
    max_length: int,
    shard_rows: int,
    progress: Callable[[str, int], Any] = lambda what, rows: None,
) -> None:
    """Writes all rows and skips shards that are already committed.

    A shard holds ``shard_rows`` selected rows minus those that are too long. So a row's shard does
    not depend on where an earlier run stopped.

    Args:
      rows: the rows, in a reproducible order.
      renderer: turns text into tokens.
      writer: the corpus's writer.
      max_length: longer rows are dropped and counted.
      shard_rows: rows per shard.
      progress: called with what is done and the number of rows so far.

    Raises:
      UserError: a row is a conversation and there is no template.
    """
    shards = _Shards(writer, max_length)
    try:
        # One batch is tokenised, in the tokenizer's own threads, while the rows of the next are
        # read. Results are written in order.
        with ThreadPoolExecutor(1) as pool:
            pending: tuple[list[_Place], Future[list[Encoded]]] | None = None
            for batch in _batches(_missing(rows, writer, shard_rows, progress)):
                source, split = batch[0][0].source, batch[0][0].split
                texts = [selected.row for selected, _ in batch]
                started = pool.submit(
                    renderer.encode_batch, texts, source, prompts_only=split == "fresh"
                )
                if pending is not None:
                    shards.write(pending[0], pending[1].result())
                pending = batch, started
            if pending is not None:
                shards.write(pending[0], pending[1].result())
        shards.commit_all()
    except BaseException:
        shards.abandon()
        raise


def left_out(row: Encoded, max_length: int) -> str | None:
    """The reason for dropping a row, or None."""
    return row.drop or length_problem(len(row.tokens), row.prompt_length, max_length)


def _missing(
    rows: Iterator[SelectedRow],
    writer: CorpusWriter,
    shard_rows: int,
    progress: Callable[[str, int], Any],
) -> Iterator[_Place]:
    """Rows whose shard is not committed, with the shard's number."""
    seen: dict[CorpusSplit, int] = dict.fromkeys(SPLITS, 0)
    for number, selected in enumerate(rows):
        if number % 10_000 == 0:
            progress("rows turned into tokens", number)
        shard = seen[selected.split] // shard_rows
        seen[selected.split] += 1
        if not writer.has(selected.split, shard):
            yield selected, shard


def _batches(places: Iterator[_Place]) -> Iterator[list[_Place]]:
    """Groups consecutive rows of one source and kind."""
    batch: list[_Place] = []
    for place in places:
        if batch and (len(batch) == BATCH_ROWS or place[0].label != batch[0][0].label):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


class _Shards:
    """The open shard of each split."""

    def __init__(self, writer: CorpusWriter, max_length: int) -> None:
        self._writer = writer
        self._max_length = max_length
        self._open: dict[CorpusSplit, tuple[int, ShardWriter]] = {}

    def write(self, places: list[_Place], encoded: list[Encoded]) -> None:
        for (selected, number), row in zip(places, encoded, strict=True):
            shard = self._shard(selected.split, number)
            reason = left_out(row, self._max_length)
            if reason is not None:
                shard.drop(reason, selected.row.origin, selected.label)
            else:
                shard.write(row.tokens, row.prompt_length, selected.label, row.earlier)
                for note in row.notes:
                    shard.note(note, selected.row.origin, selected.label)

    def _shard(self, split: CorpusSplit, number: int) -> ShardWriter:
        if split in self._open and self._open[split][0] != number:
            self._open.pop(split)[1].commit()
        if split not in self._open:
            self._open[split] = number, self._writer.open_shard(split, number)
        return self._open[split][1]

    def commit_all(self) -> None:
        while self._open:
            self._open.popitem()[1][1].commit()

    def abandon(self) -> None:
        while self._open:
            self._open.popitem()[1][1].abandon()
