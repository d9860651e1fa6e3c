"""Decides which rows of the sources stay, and which split each belongs to.

There are two passes over the text, because the share of validation rows needs the number of rows.
The first keeps one byte per row, and the second yields the rows that stay. Test prompts occur in no
other split, nor do validation prompts, because the split is by prompt. Fresh prompts occur in
neither.

The prompt of a conversation is its first user message. That of a plain text is its first sentences
or tokens. Split, test set, fresh prompts and benchmarks all use the prompt; deduplication and
``max_rows`` use the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from proxykd_jax.config import CorpusConfig, SourceConfig
from proxykd_jax.data.corpus import CorpusSplit
from proxykd_jax.errors import UserError
from proxykd_jax.texts.contamination import ContaminationIndex, Match, contamination_report
from proxykd_jax.texts.dedup import Deduplicator, PromptSet
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, Notes, TextRow
from proxykd_jax.texts.row_limit import RowLimit
from proxykd_jax.texts.split import effective_validation_fraction, split_name
from proxykd_jax.texts.template import Renderer
from proxykd_jax.texts.text_prompts import with_prompts

REPEATED = "repeats an earlier row"
IN_TEST = "its prompt is in the test set"
IN_VALIDATION = "its prompt is in the validation set"
IN_BENCHMARK = "holds a benchmark question"
BEYOND_MAX_ROWS = "beyond max_rows"
_LEFT_OUT, _KEPT = 0, 1
MATCHES_SHOWN = 5


@dataclass
class SourceCount:
    """Counts of one source before tokenisation.

    Attributes:
      read: rows found, including those dropped during reading.
      drops: dropped rows, by reason.
      notes: what a reader should know about them.
    """

    read: int = 0
    drops: Drops = field(default_factory=Drops)
    notes: Notes = field(default_factory=Notes)


@dataclass
class Selection:
    """The result of the first pass.

    Attributes:
      kept: one byte per row of ``corpus.sources``, in reading order: whether it stays.
      rows: number of rows that stay.
      validation_fraction: share set aside.
      test_prompts: prompts of the test set.
      benchmarks: the questions to search for, or None.
      sources: counts by the source's label.
    """

    kept: np.ndarray
    rows: int
    validation_fraction: float
    test_prompts: PromptSet
    benchmarks: ContaminationIndex | None
    sources: dict[str, SourceCount]


class SelectedRow(NamedTuple):
    """A row that stays.

    Attributes:
      split: its split.
      label: label of its source, for counts.
      source: its source.
      row: the row.
    """

    split: CorpusSplit
    label: str
    source: SourceConfig
    row: TextRow


def source_label(group: str, index: int, source: SourceConfig) -> str:
    """The name of a source in counts: its config key and its index."""
    return f"{group}.{index} ({source.path or source.dataset or source.tfds})"


def nothing_left(drops: Mapping[str, Drops]) -> UserError:
    """The error for a corpus without any row left, with the reasons by source."""
    listed = "\n  ".join(f"{label}: {dropped}" for label, dropped in drops.items())
    return UserError(f"No row of the corpus is left. Left out:\n  {listed}")


def source_changed() -> UserError:
    """The error for a source whose rows differ when it is read again."""
    return UserError(
        "A source of the corpus changed while it was read. Run again when it no longer changes."
    )


def count_beyond(drops: Drops, rows: int) -> None:
    """Counts rows beyond ``max_rows``, without examples, which would explain nothing."""
    if rows:
        drops.counts[BEYOND_MAX_ROWS] = rows
        drops.origins[BEYOND_MAX_ROWS] = ["chosen by hash"]


def select_rows(
    corpus: CorpusConfig,
    renderer: Renderer,
    progress: Callable[[str, int], Any] = lambda what, rows: None,
) -> Selection:
    """The first pass: reads everything and decides which rows stay.

    Args:
      corpus: the section of the config.
      renderer: finds prompts that are counted in tokens, and rows that are too long for
        ``max_rows``.
      progress: called with what is done and the number of rows so far.

    Raises:
      UserError: a source cannot be read, benchmark questions are in the corpus and
        ``contamination`` is ``refuse``, or nothing stays.
    """
    benchmarks = ContaminationIndex.from_files(corpus.benchmarks) if corpus.benchmarks else None
    sources: dict[str, SourceCount] = {}
    test_prompts = PromptSet()
    for _, row in _read("test", corpus.test, sources, renderer):
        test_prompts.add(row)
    repeated = Deduplicator() if corpus.deduplicate else None
    limit = (
        None if corpus.max_rows is None else RowLimit(corpus.max_rows, corpus.max_length, renderer)
    )
    kept = bytearray()
    ends: dict[str, int] = {}  # index in kept where a source's rows end
    yielded: dict[str, int] = {}
    matches: list[Match] = []
    contaminated = 0
    # Tokenising texts an additional time pays only if their prompts are needed.
    asked = renderer if corpus.test or corpus.benchmarks else None
    for label, row in _read("sources", corpus.sources, sources, asked):
        if len(kept) % 10_000 == 0:
            progress("rows looked at", len(kept))
        drops = sources[label].drops
        kept.append(_LEFT_OUT)
        ends[label] = len(kept)
        yielded[label] = yielded.get(label, 0) + 1
        if row in test_prompts:
            drops.add(IN_TEST, row.origin)
        elif repeated is not None and not repeated.is_new(row):
            drops.add(REPEATED, row.origin)
        elif benchmarks is not None and (match := benchmarks.match(row)) is not None:
            drops.add(IN_BENCHMARK, row.origin)
            contaminated += 1
            matches += [match] if len(matches) < MATCHES_SHOWN else []
        else:
            kept[-1] = _KEPT
            if limit is not None:
                limit.add(row, corpus.sources[row.source_index])
    if contaminated and corpus.contamination == "refuse":
        raise UserError(contamination_report(matches, contaminated))
    kept_rows = np.frombuffer(kept, np.uint8).astype(bool)
    if limit is not None:
        kept_rows[kept_rows] = limit.chosen()
        beyond = np.frombuffer(kept, np.uint8).astype(bool) & ~kept_rows
        for label, end in ends.items():
            begin = end - yielded[label]
            count_beyond(sources[label].drops, int(beyond[begin:end].sum()))
    rows = int(kept_rows.sum())
    if not rows:
        raise nothing_left({label: count.drops for label, count in sources.items()})
    fraction = effective_validation_fraction(
        rows,
        validation_fraction=corpus.validation_fraction,
        validation_rows=corpus.validation_rows,
    )
    return Selection(kept_rows, rows, fraction, test_prompts, benchmarks, sources)


def selected_rows(
    corpus: CorpusConfig, selection: Selection, renderer: Renderer
) -> Iterator[SelectedRow]:
    """The second pass: the test set, then the corpus, then fresh prompts, in reading order.

    Adds the counts that only this pass knows to ``selection``.

    Raises:
      UserError: a source changed since the first pass.
    """
    counts: dict[str, SourceCount] = {}
    repeated = Deduplicator()
    for label, row in _read("test", corpus.test, counts, None):
        if not corpus.deduplicate or repeated.is_new(row):
            yield SelectedRow("test", label, corpus.test[row.source_index], row)
        else:
            selection.sources[label].drops.add(REPEATED, row.origin)
    validation_prompts = PromptSet()
    number = 0
    for label, row in _read("sources", corpus.sources, counts, renderer):
        if number >= len(selection.kept):
            break
        number += 1
        if not selection.kept[number - 1]:
            continue
        split = split_name(
            row.first_user_message,
            shares=corpus.shares,
            validation_fraction=selection.validation_fraction,
        )
        if split == "validation":
            validation_prompts.add(row)
        yield SelectedRow(split, label, corpus.sources[row.source_index], row)
    read = {label: count.read for label, count in counts.items()}
    if read != {label: count.read for label, count in selection.sources.items()}:
        raise source_changed()
    yield from _fresh_rows(corpus, selection, validation_prompts, renderer)


def _fresh_rows(
    corpus: CorpusConfig, selection: Selection, validation_prompts: PromptSet, renderer: Renderer
) -> Iterator[SelectedRow]:
    repeated = Deduplicator()
    for label, row in _read("fresh_prompts", corpus.fresh_prompts, selection.sources, renderer):
        drops = selection.sources[label].drops
        if row in selection.test_prompts:
            drops.add(IN_TEST, row.origin)
        elif row in validation_prompts:
            drops.add(IN_VALIDATION, row.origin)
        elif selection.benchmarks is not None and row.without_answer in selection.benchmarks:
            drops.add(IN_BENCHMARK, row.origin)
        elif not repeated.is_new(row.without_answer):
            drops.add(REPEATED, row.origin)
        else:
            yield SelectedRow("fresh", label, corpus.fresh_prompts[row.source_index], row)


def _read(
    group: str,
    sources: tuple[SourceConfig, ...],
    counts: dict[str, SourceCount],
    renderer: Renderer | None,
) -> Iterator[tuple[str, TextRow]]:
    """Rows of a list of sources with their labels and prompts; fills ``counts``."""
    for index, source in enumerate(sources):
        label = source_label(group, index, source)
        count = counts[label] = SourceCount()
        for row in read_rows(group, index, source, count, renderer):
            yield label, row


def read_rows(
    group: str,
    index: int,
    source: SourceConfig,
    count: SourceCount,
    renderer: Renderer | None,
    *,
    is_piece: bool = False,
) -> Iterator[TextRow]:
    """Rows of one source, or of one of its pieces, with their prompts.

    Args:
      group: the config key that lists it: ``test``, ``sources`` or ``fresh_prompts``.
      index: its index in that list.
      source: the source.
      count: filled during reading.
      renderer: finds prompts that are counted in tokens; without it they stay unknown.
      is_piece: it comes from ``source_pieces`` and may give no row.

    Raises:
      UserError: see ``read_source``.
    """
    drops = Drops()
    rows = read_source(
        source,
        prompts_only=group == "fresh_prompts",
        drops=drops,
        notes=count.notes,
        held_out=group == "test",
        source_index=index,
        is_piece=is_piece,
    )
    for row in with_prompts(rows, source, renderer):
        count.read += 1
        yield row
    count.read += drops.total
    count.drops.merge(drops)
