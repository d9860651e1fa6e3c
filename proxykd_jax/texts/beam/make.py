"""Runs the steps of a corpus on Beam, and reports errors in the words of the local path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from proxykd_jax.config import CorpusConfig
from proxykd_jax.data.corpus_writer import CorpusWriter
from proxykd_jax.errors import UserError
from proxykd_jax.texts.beam import decide, scan, write
from proxykd_jax.texts.beam.job import FOR_ALL, Job, begin_job
from proxykd_jax.texts.beam.pipelines import Pipelines
from proxykd_jax.texts.contamination import Match, contamination_report
from proxykd_jax.texts.readers import no_usable_row
from proxykd_jax.texts.records import Drops, Notes
from proxykd_jax.texts.row_limit import threshold_of
from proxykd_jax.texts.selection import (
    BEYOND_MAX_ROWS,
    IN_BENCHMARK,
    MATCHES_SHOWN,
    SourceCount,
    count_beyond,
    nothing_left,
)
from proxykd_jax.texts.split import effective_validation_fraction

_WORK = ".prepare_beam.tmp"
# At 24 bytes per row about 50 MB per worker.
_ROWS_A_BUCKET = 1 << 21
_FEWEST_BUCKETS = 16


def write_with_beam(
    corpus: CorpusConfig, tokenizer: str, writer: CorpusWriter
) -> tuple[dict[str, SourceCount], float]:
    """Commits every shard of a corpus that is not committed yet.

    Args:
      corpus: the section of the config, with ``beam``.
      tokenizer: folder or hub name.
      writer: writer of the corpus folder; the columns lie in that folder's parent during this call.

    Returns:
      Counts of every source before tokenisation, by label, and the validation fraction.

    Raises:
      UserError: Beam or its runner is missing; a source, benchmark or row is invalid.
    """
    assert corpus.beam is not None
    work = writer.folder.resolve().parent / _WORK
    shutil.rmtree(work, ignore_errors=True)  # left by a killed run
    work.mkdir()
    try:
        # A new name, so that no worker mistakes an earlier run's job for this one.
        folder = tempfile.mkdtemp(dir=work)
        pipelines = Pipelines(corpus.beam, folder)
        job = begin_job(Path(folder), corpus, tokenizer, writer.folder.resolve())
        return _make(job, pipelines, writer)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _make(
    job: Job, pipelines: Pipelines, writer: CorpusWriter
) -> tuple[dict[str, SourceCount], float]:
    everything = range(len(job.pieces))
    sources, fresh = job.numbers("sources"), job.numbers("fresh_prompts")
    first = job.numbers("test", "sources")
    pipelines.scan(everything)
    _check_scan(job, first, FOR_ALL)
    buckets = _FEWEST_BUCKETS + _rows(job, everything) // _ROWS_A_BUCKET
    decide.hold_out(job, decide.TEST, _prompts(job, scan.SCAN, job.numbers("test")))
    pipelines.judge(first, buckets)
    _check_benchmarks(job, sources)
    threshold, rows = _limit(job, pipelines, sources)
    if not rows:
        counts = _judged_counts(job, first)
        raise nothing_left({label: count.drops for label, count in counts.items()})
    fraction = effective_validation_fraction(
        rows,
        validation_fraction=job.corpus.validation_fraction,
        validation_rows=job.corpus.validation_rows,
    )
    pipelines.assign(first, fraction, threshold)
    _check_scan(job, fresh)
    if fresh:
        decide.hold_out(job, decide.VALIDATION, _prompts(job, decide.ASSIGNED, sources))
        pipelines.judge(fresh, buckets)
        pipelines.assign(fresh, fraction, None)
    write.plan_shards(job, writer)
    pipelines.write(everything)
    _raise_first(job, write.WRITTEN, everything)
    write.check_shards(job)
    return _counts(job, everything), fraction


def _raise_first(job: Job, step: str, numbers: Iterable[int]) -> None:
    for number in numbers:
        error = job.noted_error(step, number)
        if error is not None:
            raise error


def _check_scan(job: Job, numbers: Iterable[int], *before: int) -> None:
    """Raises the first error in reading order.

    Raises:
      UserError: a piece, or one that all others need (``before``), cannot be read; or a source has
        no usable row.
    """
    _raise_first(job, scan.SCAN, before)
    by_source: dict[str, list[int]] = {}
    for number in numbers:
        by_source.setdefault(job.pieces[number].label, []).append(number)
    for members in by_source.values():
        _raise_first(job, scan.SCAN, members)
        if not _rows(job, members):
            drops = Drops()
            for number in members:
                drops.merge(_scan_drops(job, number))
            piece = job.pieces[members[0]]
            raise no_usable_row(getattr(job.corpus, piece.group)[piece.index], drops)


def _rows(job: Job, numbers: Iterable[int]) -> int:
    return sum(len(job.found(scan.SCAN, number).arrays["digests"]) for number in numbers)


def _scan_drops(job: Job, number: int) -> Drops:
    return Drops.from_json(job.found(scan.SCAN, number).metadata["drops"])


def _prompts(job: Job, step: str, numbers: Iterable[int]) -> Iterable:
    return (job.found(step, number).arrays["prompts"].reshape(-1) for number in numbers)


def _judged(job: Job, number: int, reason: str = "") -> int:
    """Rows of a piece dropped for a reason; without a reason, the rows that stay."""
    return job.found(decide.JUDGED, number).metadata["counts"][decide.REASONS.index(reason)]


def _check_benchmarks(job: Job, sources: Iterable[int]) -> None:
    counts = {number: _judged(job, number, IN_BENCHMARK) for number in sources}
    contaminated = sum(counts.values())
    if not contaminated or job.corpus.contamination != "refuse":
        return
    found = (match for number, count in counts.items() if count for match in _matches(job, number))
    raise UserError(contamination_report(list(islice(found, MATCHES_SHOWN)), contaminated))


def _matches(job: Job, number: int) -> Iterable[Match]:
    verdicts = job.found(decide.JUDGED, number).arrays["verdicts"].tolist()
    benchmarks = job.benchmarks
    assert benchmarks is not None
    for row, verdict in zip(job.rows_again(number, len(verdicts)), verdicts, strict=True):
        if decide.REASONS[verdict] == IN_BENCHMARK:
            match = benchmarks.match(row)
            assert match is not None
            yield match


def _limit(job: Job, pipelines: Pipelines, sources: list[int]) -> tuple[int | None, int]:
    """The hash threshold of ``max_rows`` (None without it), and the number of rows that stay."""
    max_rows = job.corpus.max_rows
    if max_rows is None:
        return None, sum(_judged(job, number) for number in sources)
    pipelines.look_at_lengths(sources)
    _raise_first(job, decide.LIMITED, sources)
    threshold = threshold_of(decide.smallest_hashes(job, max_rows, sources), max_rows)
    return threshold, decide.kept_below(job, threshold, sources)


def _judged_counts(job: Job, numbers: Iterable[int]) -> dict[str, SourceCount]:
    """If no row is left: the reasons with examples, found by reading everything again."""
    return _summed(job, numbers, {number: write.judged_drops(job, number) for number in numbers})


def _counts(job: Job, numbers: Iterable[int]) -> dict[str, SourceCount]:
    left_out = {
        number: Drops.from_json(job.found(write.WRITTEN, number).metadata["drops"])
        for number in numbers
    }
    counts = _summed(job, numbers, left_out)
    beyond: dict[str, int] = {}
    for number in numbers:
        found = job.found(decide.ASSIGNED, number).metadata["verdicts"]
        label = job.pieces[number].label
        beyond[label] = beyond.get(label, 0) + found[decide.REASONS.index(BEYOND_MAX_ROWS)]
    for label, rows in beyond.items():
        count_beyond(counts[label].drops, rows)
    return counts


def _summed(job: Job, numbers: Iterable[int], left_out: dict[int, Drops]) -> dict[str, SourceCount]:
    """By source: rows read and rows dropped, in reading order."""
    counts: dict[str, SourceCount] = {}
    for number in numbers:
        count = counts.setdefault(job.pieces[number].label, SourceCount())
        scanned = job.found(scan.SCAN, number).metadata
        count.read += scanned["read"]
        count.notes.merge(Notes.from_json(scanned["notes"]))
        count.drops.merge(left_out[number])
    for number in numbers:
        counts[job.pieces[number].label].drops.merge(_scan_drops(job, number))
    return counts
