"""Decides from columns which rows stay and where they go; only ``max_rows`` needs their text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from proxykd_jax.data.corpus import SPLITS
from proxykd_jax.texts.beam.job import Job, job_in
from proxykd_jax.texts.beam.scan import SCAN
from proxykd_jax.texts.row_limit import RowLimit, below_threshold
from proxykd_jax.texts.selection import (
    BEYOND_MAX_ROWS,
    IN_BENCHMARK,
    IN_TEST,
    IN_VALIDATION,
    REPEATED,
)
from proxykd_jax.texts.split import split_at

JUDGED, HELD_OUT, LIMITED, ASSIGNED = "judged", "held_out", "limited", "assigned"
TEST, VALIDATION = 0, 1  # numbers of HELD_OUT
# A verdict is one byte per row: 0 means the row stays; another number is an index into REASONS.
KEPT = 0
REASONS = ("", IN_TEST, IN_VALIDATION, REPEATED, IN_BENCHMARK, BEYOND_MAX_ROWS)
NO_SPLIT = 255
Block = tuple[int, np.ndarray, np.ndarray]  # a piece, uint64[n] digests, int64[n] row numbers


def hold_out(job: Job, which: int, prompts: Iterable[np.ndarray]) -> None:
    """Stores the prompts of the test set or of validation, which may occur in no other split."""
    found = [np.unique(array) for array in prompts]
    merged = np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)
    job.commit(HELD_OUT, which, {"prompts": merged})


def blocks_to_compare(folder: str, buckets: int, number: int) -> Iterator[tuple[str, Block]]:
    """A piece's digests of rows that may be repeated, each with the bucket that compares it."""
    job = job_in(folder)
    group = job.pieces[number].group
    if group != "fresh_prompts" and not job.corpus.deduplicate:
        return
    digests = job.found(SCAN, number).arrays["digests"]
    compared = np.flatnonzero(_before_repeats(job, number) == KEPT)
    bucket_of = digests[compared] % np.uint64(buckets)
    for bucket in np.unique(bucket_of).tolist():
        rows = compared[bucket_of == bucket]
        yield f"{group}/{bucket}", (number, digests[rows], rows)


def repeated_rows(bucket: tuple[str, Iterable[Block]]) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of a bucket whose digest an earlier row has, by piece, as int64 row numbers."""
    blocks = sorted(bucket[1], key=lambda block: block[0])
    digests = np.concatenate([block[1] for block in blocks])
    is_repeated = np.ones(len(digests), bool)
    is_repeated[np.unique(digests, return_index=True)[1]] = False  # the first of each
    ends = np.cumsum([len(block[1]) for block in blocks])[:-1]
    for (number, _, rows), repeated in zip(blocks, np.split(is_repeated, ends), strict=True):
        if repeated.any():
            yield number, rows[repeated]


def judge(folder: str, repeated: tuple[int, Iterable[np.ndarray | None]]) -> None:
    """Stores the verdicts of a piece, uint8[n], and their counts."""
    job, number = job_in(folder), repeated[0]
    verdicts = _before_repeats(job, number)
    for rows in repeated[1]:
        if rows is not None:
            verdicts[rows] = REASONS.index(REPEATED)
    if job.pieces[number].group == "sources":
        _mark_benchmarks(job, number, verdicts)
    job.commit(JUDGED, number, {"verdicts": verdicts}, {"counts": _counts(verdicts, len(REASONS))})


def _before_repeats(job: Job, number: int) -> np.ndarray:
    """uint8[n]: verdicts that precede the comparison of rows, in the order of ``selection``."""
    group, columns = job.pieces[number].group, job.found(SCAN, number).arrays
    verdicts = np.zeros(len(columns["digests"]), np.uint8)
    if group == "test":
        return verdicts
    if job.corpus.test:
        _mark_held_out(job, TEST, columns["prompts"], verdicts, IN_TEST)
    if group == "fresh_prompts":
        _mark_held_out(job, VALIDATION, columns["prompts"], verdicts, IN_VALIDATION)
        _mark_benchmarks(job, number, verdicts)
    return verdicts


def _mark_held_out(
    job: Job, which: int, prompts: np.ndarray, verdicts: np.ndarray, reason: str
) -> None:
    found = np.isin(prompts, job.found(HELD_OUT, which).arrays["prompts"]).any(axis=1)
    verdicts[found & (verdicts == KEPT)] = REASONS.index(reason)


def _mark_benchmarks(job: Job, number: int, verdicts: np.ndarray) -> None:
    if job.corpus.benchmarks:
        found = job.found(SCAN, number).arrays["in_benchmark"]
        verdicts[found & (verdicts == KEPT)] = REASONS.index(IN_BENCHMARK)


def _counts(codes: np.ndarray, kinds: int) -> list[int]:
    return np.bincount(codes, minlength=kinds)[:kinds].tolist()


def look_at_lengths(folder: str, number: int) -> None:
    """For ``max_rows``: ``hashes`` of the rows that stay, and the ``smallest`` that fit."""
    job = job_in(folder)
    if job.has_error(LIMITED, before=number):
        return
    assert job.corpus.max_rows is not None
    with job.notes_errors(LIMITED, number):
        verdicts = job.found(JUDGED, number).arrays["verdicts"]
        limit = RowLimit(job.corpus.max_rows, job.corpus.max_length, job.renderer)
        for row, verdict in zip(job.rows_again(number, len(verdicts)), verdicts, strict=True):
            if verdict == KEPT:
                limit.add(row, job.pieces[number].source)
        smallest = np.array(limit.smallest(), np.uint64)
        job.commit(LIMITED, number, {"hashes": limit.hashes, "smallest": smallest})


def smallest_hashes(job: Job, max_rows: int, numbers: Iterable[int]) -> list[int]:
    """The ``max_rows + 1`` smallest hashes of rows that fit, over all pieces."""
    smallest = np.zeros(0, np.uint64)
    for number in numbers:
        found = job.found(LIMITED, number).arrays["smallest"]
        smallest = np.sort(np.concatenate([smallest, found]))[: max_rows + 1]
    return smallest.tolist()


def kept_below(job: Job, threshold: int, numbers: Iterable[int]) -> int:
    """Number of rows that ``max_rows`` leaves."""
    return sum(
        int(below_threshold(job.found(LIMITED, number).arrays["hashes"], threshold).sum())
        for number in numbers
    )


def assign(folder: str, fraction: float, threshold: int | None, number: int) -> None:
    """Stores a piece's final ``verdicts`` and ``splits``, uint8[n], and their counts.

    A split is stored as its index in ``SPLITS``. If fresh prompts must avoid validation, the
    digests of the piece's validation ``prompts`` are stored, too.
    """
    job = job_in(folder)
    group = job.pieces[number].group
    columns = job.found(SCAN, number).arrays
    verdicts = np.array(job.found(JUDGED, number).arrays["verdicts"])
    splits = np.full(len(verdicts), NO_SPLIT, np.uint8)
    if threshold is not None and group == "sources":
        rows = np.flatnonzero(verdicts == KEPT)
        stays = below_threshold(job.found(LIMITED, number).arrays["hashes"], threshold)
        verdicts[rows[~stays]] = REASONS.index(BEYOND_MAX_ROWS)
    kept = np.flatnonzero(verdicts == KEPT)
    if group == "sources":
        shares = job.corpus.shares
        splits[kept] = [
            SPLITS.index(split_at((held_out, place), shares=shares, validation_fraction=fraction))
            for held_out, place in columns["places"][kept].tolist()
        ]
    else:
        splits[kept] = SPLITS.index("test" if group == "test" else "fresh")
    arrays = {"verdicts": verdicts, "splits": splits}
    if group == "sources" and job.corpus.fresh_prompts:
        arrays["prompts"] = np.unique(columns["prompts"][splits == SPLITS.index("validation")])
    metadata = {
        "verdicts": _counts(verdicts, len(REASONS)),
        "splits": _counts(splits[kept], len(SPLITS)),
    }
    job.commit(ASSIGNED, number, arrays, metadata)
