"""Reads a piece and keeps what is compared with other rows, without their text."""

from __future__ import annotations

from array import array

import numpy as np

from proxykd_jax.texts.beam.job import FOR_ALL, Job, job_in
from proxykd_jax.texts.dedup import prompt_digests, row_digest
from proxykd_jax.texts.selection import SourceCount
from proxykd_jax.texts.split import split_places

SCAN = "scan"


def scan(folder: str, number: int) -> None:
    """Reads a piece of n rows and stores its columns.

    ``digests`` uint64[n]: the row as it is compared with others. ``prompts`` uint64[n, 2], if any
    split is held out: digests of its prompt (equal if there is only one). ``places`` float64[n, 2]:
    the numbers that decide the split. ``in_benchmark`` bool[n]. Metadata: rows ``read``, and the
    ``drops`` and ``notes`` during reading.
    """
    job = job_in(folder)
    if job.has_error(SCAN, before=number):
        return
    with job.notes_errors(SCAN, FOR_ALL):
        _ = job.benchmarks
    if not job.has_error(SCAN, before=number):
        with job.notes_errors(SCAN, number):
            _scan(job, number)


def _scan(job: Job, number: int) -> None:
    group = job.pieces[number].group
    fresh = group == "fresh_prompts"
    benchmarks = None if group == "test" else job.benchmarks
    compares_prompts = bool(job.corpus.test or job.corpus.fresh_prompts)
    digests, prompts, places, in_benchmark = array("Q"), array("Q"), array("d"), bytearray()
    count = SourceCount()
    for row in job.rows(number, count):
        compared = row.without_answer if fresh else row
        digests.append(row_digest(compared))
        if compares_prompts:
            found = sorted(prompt_digests(row))
            prompts.extend((found[0], found[-1]))
        if group == "sources":
            places.extend(split_places(row.first_user_message))
        if benchmarks is not None:
            in_benchmark.append(compared in benchmarks)
    columns = {
        "digests": np.array(digests, np.uint64),
        "prompts": np.array(prompts, np.uint64).reshape(-1, 2),
        "places": np.array(places, np.float64).reshape(-1, 2),
        "in_benchmark": np.array(in_benchmark, np.uint8).astype(bool),
    }
    job.commit(
        SCAN,
        number,
        columns,
        {
            "read": count.read,
            "drops": count.drops.as_json(),
            "notes": count.notes.as_json(),
        },
    )
