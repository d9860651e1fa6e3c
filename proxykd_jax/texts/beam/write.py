"""Tokenises pieces and writes shards: one worker writes a whole shard, in reading order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, cast

import numpy as np

from proxykd_jax.data.corpus import SPLITS, CorpusSplit
from proxykd_jax.data.corpus_writer import CorpusWriter
from proxykd_jax.texts.beam.decide import ASSIGNED, JUDGED, KEPT, NO_SPLIT, REASONS
from proxykd_jax.texts.beam.job import Job, job_in
from proxykd_jax.texts.encode import BATCH_ROWS, left_out
from proxykd_jax.texts.records import Drops, TextRow
from proxykd_jax.texts.selection import BEYOND_MAX_ROWS

PLAN, WRITTEN = "plan", "written"


class _ShardRow(NamedTuple):
    """A row on its way to its shard.

    Attributes:
      number: its number in the piece.
      tokens: int32[T] as bytes; empty if it is dropped.
      prompt_length: P.
      problem: why it is dropped and its origin, or None.
      earlier: int32[n, 2] as bytes, as in ``TokenRow``; None for none.
      notes: what a reader should know, each with the row's origin.
    """

    number: int
    tokens: bytes
    prompt_length: int
    problem: tuple[str, str] | None
    earlier: bytes | None = None
    notes: tuple[tuple[str, str], ...] = ()


# The rows that a batch of a piece contributes to one shard: piece, label, rows in order.
ShardBlock = tuple[int, str, list[_ShardRow]]


def plan_shards(job: Job, writer: CorpusWriter) -> None:
    """Stores where every piece's rows start in each split, and which shards are committed.

    ``starts`` int64[pieces + 1, splits], the last row being the totals; ``done_<split>`` int64.
    """
    counts = [job.found(ASSIGNED, number).metadata["splits"] for number in range(len(job.pieces))]
    starts = np.zeros((len(counts) + 1, len(SPLITS)), np.int64)
    np.cumsum(counts, axis=0, out=starts[1:])
    arrays = {"starts": starts}
    for split in SPLITS:
        arrays[f"done_{split}"] = np.array(writer.committed(split), np.int64)
    job.commit(PLAN, 0, arrays)


def encode_piece(folder: str, number: int) -> Iterator[tuple[str, ShardBlock]]:
    """A piece's rows as tokens, by shard (``split/number``), without committed shards.

    Stores which rows were dropped before, with reasons. A piece stops at its first error.
    """
    job = job_in(folder)
    if job.has_error(WRITTEN, before=number):
        return
    with job.notes_errors(WRITTEN, number):
        yield from _encode_piece(job, number)


def _encode_piece(job: Job, number: int) -> Iterator[tuple[str, ShardBlock]]:
    columns = job.found(ASSIGNED, number).arrays
    shards = _shards(job, number, columns["splits"])
    drops = Drops()
    batch: list[tuple[int, TextRow]] = []
    rows = job.rows_again(number, len(shards))
    for place, (row, verdict) in enumerate(zip(rows, columns["verdicts"].tolist(), strict=True)):
        _count_drop(drops, row, verdict)
        if shards[place] >= 0:
            batch.append((place, row))
        if len(batch) == BATCH_ROWS:
            yield from _encode_batch(job, number, batch, columns["splits"], shards)
            batch = []
    if batch:
        yield from _encode_batch(job, number, batch, columns["splits"], shards)
    job.commit(WRITTEN, number, {}, {"drops": drops.as_json()})


def _shards(job: Job, number: int, splits: np.ndarray) -> np.ndarray:
    """int64[n]: the shard of each row; -1 if it has none, or if the shard is committed."""
    plan = job.found(PLAN, 0).arrays
    shards = np.full(len(splits), -1, np.int64)
    for code, split in enumerate(SPLITS):
        rows = np.flatnonzero(splits == code)
        ranks = plan["starts"][number, code] + np.arange(len(rows))
        found = ranks // job.corpus.shard_rows
        shards[rows] = np.where(np.isin(found, plan[f"done_{split}"]), -1, found)
    return shards


def _encode_batch(
    job: Job,
    number: int,
    batch: list[tuple[int, TextRow]],
    splits: np.ndarray,
    shards: np.ndarray,
) -> Iterator[tuple[str, ShardBlock]]:
    piece = job.pieces[number]
    encoded = job.renderer.encode_batch(
        [row for _, row in batch], piece.source, prompts_only=piece.group == "fresh_prompts"
    )
    blocks: dict[str, list[_ShardRow]] = {}
    for (place, row), found in zip(batch, encoded, strict=True):
        assert splits[place] != NO_SPLIT
        key = f"{SPLITS[splits[place]]}/{shards[place]}"
        reason = left_out(found, job.corpus.max_length)
        if reason is None:
            earlier = None if found.earlier is None else found.earlier.tobytes()
            notes = tuple((note, row.origin) for note in found.notes)
            tokens = found.tokens.tobytes()
            kept = _ShardRow(place, tokens, found.prompt_length, None, earlier, notes)
        else:
            kept = _ShardRow(place, b"", 0, (reason, row.origin))
        blocks.setdefault(key, []).append(kept)
    for key, rows in blocks.items():
        yield key, (number, piece.label, rows)


def write_shard(folder: str, shard: tuple[str, Iterable[ShardBlock]]) -> None:
    """Writes a shard if all its rows have arrived; a piece with an error sends no more rows."""
    job = job_in(folder)
    name, _, number = shard[0].partition("/")
    split, place = cast(CorpusSplit, name), int(number)
    blocks = sorted(shard[1], key=lambda block: (block[0], block[2][0].number))
    shard_rows = job.corpus.shard_rows
    expected = min(shard_rows, _total(job, split) - place * shard_rows)
    if sum(len(block[2]) for block in blocks) != expected:
        return
    writer = CorpusWriter(job.corpus_folder, one_of_several=True).open_shard(split, place)
    try:
        for _, label, block in blocks:
            for row in block:
                if row.problem is not None:
                    writer.drop(*row.problem, label)
                else:
                    tokens, earlier = np.frombuffer(row.tokens, np.int32), None
                    if row.earlier is not None:
                        earlier = np.frombuffer(row.earlier, np.int32).reshape(-1, 2)
                    writer.write(tokens, row.prompt_length, label, earlier)
                    for note in row.notes:
                        writer.note(*note, label)
        writer.commit()
    except BaseException:
        writer.abandon()
        raise


def check_shards(job: Job) -> None:
    """Checks that every planned shard is committed.

    Raises:
      RuntimeError: one is not although no piece had an error, so the runner lost rows.
    """
    writer = CorpusWriter(job.corpus_folder, one_of_several=True)
    for split in SPLITS:
        planned = -(-_total(job, split) // job.corpus.shard_rows)
        missing = set(range(planned)) - set(writer.committed(split))
        if missing:
            raise RuntimeError(f"shards of {split} that lack rows: {sorted(missing)}")


def _total(job: Job, split: CorpusSplit) -> int:
    return int(job.found(PLAN, 0).arrays["starts"][-1, SPLITS.index(split)])


def judged_drops(job: Job, number: int) -> Drops:
    """The dropped rows of a piece with reasons, found by reading it again."""
    drops = Drops()
    found = job.found(JUDGED, number).arrays["verdicts"].tolist()
    for row, verdict in zip(job.rows_again(number, len(found)), found, strict=True):
        _count_drop(drops, row, verdict)
    return drops


def _count_drop(drops: Drops, row: TextRow, verdict: int) -> None:
    if verdict != KEPT and REASONS[verdict] != BEYOND_MAX_ROWS:
        drops.add(REASONS[verdict], row.origin)
