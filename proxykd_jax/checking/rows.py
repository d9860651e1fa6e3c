"""Checks the rows of the corpus: what is read, what is lost, how long the rows are.

Everything is read as ``prepare`` reads it, and a sample is tokenised. A check that must be quick
reads the first rows of each source alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from proxykd_jax.checking.findings import Findings
from proxykd_jax.checking.places import missing_path, missing_repository
from proxykd_jax.config import Config, CorpusConfig, SourceConfig
from proxykd_jax.data.corpus import SPLITS, TokenCorpus, open_corpus
from proxykd_jax.errors import UserError
from proxykd_jax.texts.files import list_files, source_files
from proxykd_jax.texts.funnel import counted, describe_notes, describe_passed_over
from proxykd_jax.texts.readers import read_source
from proxykd_jax.texts.records import Drops, TextRow
from proxykd_jax.texts.selection import (
    BEYOND_MAX_ROWS,
    IN_BENCHMARK,
    IN_TEST,
    IN_VALIDATION,
    REPEATED,
    select_rows,
    selected_rows,
)
from proxykd_jax.texts.teachers import ANOTHER_MODEL
from proxykd_jax.training.sketch import RowsOfLengths, SketchedCorpus

if TYPE_CHECKING:
    from proxykd_jax.texts.template import Renderer

_SAMPLE = 2000
_QUICK_SAMPLE = 200
_BATCH = 512
_EXAMPLES_TRIED = 100
# Rows that a user asked to leave out, or that the corpus has twice, are not lost.
_WANTED = (BEYOND_MAX_ROWS, IN_BENCHMARK, IN_TEST, IN_VALIDATION, REPEATED, ANOTHER_MODEL)
MOST_LOST = 0.2
_ENOUGH_FIT = 0.95


@dataclass
class Sample:
    """Rows that were tokenised.

    Attributes:
      lengths, prompt_lengths: tokens of each row that the template renders, and of its prompt.
      drops: the others, by reason.
    """

    lengths: list[int]
    prompt_lengths: list[int]
    drops: Drops

    def fitting(self, max_length: int) -> RowsOfLengths:
        """The rows that are not too long."""
        lengths = np.array(self.lengths, np.int32)
        fits = lengths <= max_length
        return RowsOfLengths(lengths[fits], np.array(self.prompt_lengths, np.int32)[fits])


def present_sources(config: Config, findings: Findings) -> CorpusConfig:
    """The corpus section with those of its sources whose files are here."""
    corpus = config.corpus
    groups = {"sources": corpus.sources, "fresh_prompts": corpus.fresh_prompts, "test": corpus.test}
    present: dict[str, tuple[Any, ...]] = {}
    for group, members in groups.items():
        present[group] = tuple(
            source
            for index, source in enumerate(members)
            if _is_present(f"corpus.{group}.{index}", source, group == "test", findings)
        )
    kept = []
    for pattern in corpus.benchmarks:
        if _finds("corpus.benchmarks", pattern, findings):
            kept.append(pattern)
    return corpus.model_copy(update={**present, "benchmarks": tuple(kept)})


def _is_present(key: str, source: SourceConfig, held_out: bool, findings: Findings) -> bool:
    place = source.path or source.dataset or source.tfds
    if source.answers is not None and not _finds(f"{key}.answers", source.answers, findings):
        return False
    if source.path is None:
        if not Path(str(place)).exists():
            missing_repository(findings, key, str(place))
            return False
        findings.say("data", f"{key}: {place}")
        return True
    if not _finds(key, source.path, findings, held_out=held_out):
        return False
    findings.say("data", f"{key}: {place}")
    passed_over = source_files(source.path, held_out=held_out).passed_over
    if passed_over:
        findings.warn(key, describe_passed_over(passed_over))
    return True


def _finds(what: str, pattern: str, findings: Findings, *, held_out: bool | None = None) -> bool:
    try:
        if held_out is None:
            list_files(pattern)
        else:
            source_files(pattern, held_out=held_out)
    except UserError as error:
        if Path(pattern).exists():
            findings.problems.append(f"{what}: {error}")
        else:
            missing_path(findings, what, pattern)
        return False
    return True


def quick_sample(
    corpus: CorpusConfig, present: CorpusConfig, renderer: Renderer, findings: Findings
) -> None:
    """Tokenises the first rows of each source; what is lost is a problem."""

    def sampled() -> Iterator[tuple[SourceConfig, TextRow]]:
        for source in present.sources:
            rows = read_source(source, prompts_only=False, drops=unread)
            for row in itertools.islice(rows, _QUICK_SAMPLE):
                yield source, row

    unread = Drops()
    sample = findings.attempt("corpus", lambda: tokenize(sampled(), renderer))
    if sample is not None:
        sample.drops.merge(unread)
        _judge_sample(corpus, sample, findings)


@dataclass
class CountedRows:
    """The rows of a run's corpus, or what the corpus would hold.

    Attributes:
      corpus: rows by split.
      exact: the corpus is prepared; otherwise rows are estimated from a sample.
      origin: what was counted, in words.
    """

    corpus: TokenCorpus | SketchedCorpus
    exact: bool
    origin: str


def count_rows(
    config: Config, present: CorpusConfig, renderer: Renderer | None, findings: Findings
) -> CountedRows | None:
    """Reads the corpus, reports on its rows, and returns their number and lengths.

    Returns None if the number of rows is not known.
    """
    prepared = findings.attempt("corpus", lambda: _prepared(config))
    if prepared is not None:
        if renderer is not None:
            findings.attempt("corpus", lambda: _show_example(present, renderer, findings))
        return _count_prepared(config, prepared, findings)
    if renderer is None or not present.sources:
        return _count_absent(config, findings)
    found = findings.attempt("corpus", lambda: _select(config, present, renderer, findings))
    if len(present.sources) < len(config.corpus.sources):
        return _count_absent(config, findings)
    return found


def _prepared(config: Config) -> TokenCorpus | None:
    """The prepared corpus of the run; None if it is absent or incomplete."""
    from proxykd_jax.artifacts import MANIFEST, read_manifest

    folder = config.folder / "corpus"
    if not (folder / MANIFEST).exists() or read_manifest(folder)["status"] != "complete":
        return None
    return open_corpus(folder)


def _count_prepared(config: Config, corpus: TokenCorpus, findings: Findings) -> CountedRows:
    learnt = ("warmup", "align", "distill")
    rows = sum(len(corpus.split(name)) for name in learnt)
    tokens = sum(int(corpus.split(name).lengths.sum()) for name in learnt)
    for label, source in corpus.counts["sources"].items():
        for line in describe_notes(source.get("notes", {})):
            findings.say("note", f"{label}: {line}")
    judge_counts(config, corpus.counts, findings)
    return CountedRows(corpus, True, f"from {rows} rows of {tokens} tokens")


def _show_example(present: CorpusConfig, renderer: Renderer, findings: Findings) -> None:
    """Prints the first row that can be rendered, as the model will see it.

    Raises:
      UserError: none of the first rows can be rendered.
    """
    drops = Drops()
    for source in present.sources:
        for row in itertools.islice(
            read_source(source, prompts_only=False, drops=Drops()), _EXAMPLES_TRIED
        ):
            (encoded,) = renderer.encode_batch([row], source)
            if encoded.drop is None:
                findings.say("example", renderer.describe(row, source))
                return
            drops.add(encoded.drop, row.origin)
    if drops.total:
        raise UserError(f"none of the first {drops.total} rows can be rendered: {drops}.")


def _count_absent(config: Config, findings: Findings) -> CountedRows | None:
    """Rows of a corpus whose files are not here: ``max_rows`` of the greatest length, if given."""
    count = config.corpus.max_rows
    if count is None:
        findings.unchecked.append("steps: the number of rows is not known without the corpus")
        return None
    kept = count * (1 - config.corpus.validation_fraction)
    sizes = {name: -int(-kept * share // 1) for name, share in config.corpus.shares}
    most = count * config.corpus.max_length
    return CountedRows(
        SketchedCorpus.of(config, sizes, 1),
        False,
        f"from {count} rows, of at most {most} tokens, if no row is dropped",
    )


def _select(
    config: Config, present: CorpusConfig, renderer: Renderer, findings: Findings
) -> CountedRows | None:
    """Reads everything, tokenises a sample, and reports on both."""
    _show_example(present, renderer, findings)
    selection = select_rows(present, renderer)
    sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    every = selection.rows // _SAMPLE + 1

    def sampled() -> Iterator[tuple[SourceConfig, TextRow]]:
        for number, selected in enumerate(selected_rows(present, selection, renderer)):
            sizes[selected.split] += 1
            if number % every == 0 and selected.split not in ("test", "fresh"):
                yield selected.source, selected.row

    sample = tokenize(sampled(), renderer)
    read, lost = 0, Drops()
    for label, count in selection.sources.items():
        read += count.read if label.startswith("sources.") else 0
        if label.startswith("sources."):
            lost.merge(count.drops)
        for reason, number in sorted(count.drops.counts.items()):
            first = count.drops.origins[reason][0]
            findings.warn(label, f"{counted(number, 'row')} left out: {reason} (first at {first})")
        for line in describe_notes(count.notes.as_json()):
            findings.warn(label, line)
    _judge_lost(config.corpus, lost.counts, read, selection.rows, findings)
    fits = _judge_sample(config.corpus, sample, findings)
    _judge_validation(config, sizes["validation"], findings)
    return _sketch(config, sizes, sample, fits, exact=every == 1)


def _sketch(
    config: Config, sizes: Mapping[str, int], sample: Sample, fits: float, *, exact: bool
) -> CountedRows:
    """A corpus whose rows have the lengths of the sample's."""
    lengths = sample.fitting(config.corpus.max_length)
    splits, rows, tokens = {}, 0, 0
    for name, size in sizes.items():
        kept = round(size * fits) if len(lengths) else 0
        places = np.arange(kept) % max(len(lengths), 1)
        splits[name] = RowsOfLengths(lengths.lengths[places], lengths.prompt_lengths[places])
        if name in ("warmup", "align", "distill"):
            rows, tokens = rows + kept, tokens + int(splits[name].lengths.sum())
    folder = config.folder / "corpus"
    corpus = SketchedCorpus(splits, config.corpus.max_length, 1, folder)
    about = "" if exact else "about "
    return CountedRows(corpus, False, f"from {about}{rows} rows of about {tokens} tokens")


def tokenize(rows: Iterable[tuple[SourceConfig, TextRow]], renderer: Renderer) -> Sample:
    """Tokenises rows, each with the source that it came from."""
    sample = Sample([], [], Drops())
    for source, group in itertools.groupby(rows, key=lambda pair: pair[0]):
        while batch := [row for _, row in itertools.islice(group, _BATCH)]:
            for row, encoded in zip(batch, renderer.encode_batch(batch, source), strict=True):
                if encoded.drop is not None:
                    sample.drops.add(encoded.drop, row.origin)
                    continue
                sample.lengths.append(len(encoded.tokens))
                sample.prompt_lengths.append(encoded.prompt_length)
    return sample


# --- verdicts -------------------------------------------------------------------------------------


def _judge_sample(corpus: CorpusConfig, sample: Sample, findings: Findings) -> float:
    """Reports on the lengths of a sample; returns the share of its rows that a corpus keeps."""
    tried = len(sample.lengths) + sum(_not_wanted(sample.drops.counts).values())
    if not tried:
        return 0.0
    read = len(sample.lengths) + sample.drops.total
    for reason, number in sorted(sample.drops.counts.items()):
        first = sample.drops.origins[reason][0]
        findings.warn("corpus", f"{counted(number, 'row')} of {read}: {reason} (first at {first})")
    lengths = np.sort(np.array(sample.lengths or [0]))
    fit = int(np.sum(lengths <= corpus.max_length)) if sample.lengths else 0
    said = (
        f"{fit} of {tried} rows fit corpus.max_length {corpus.max_length} (tokens: median "
        f"{int(np.median(lengths))}, longest {lengths[-1]})"
    )
    wanted = rounded_length(int(np.quantile(lengths, 0.99, method="higher")))
    advice = f". Set corpus.max_length to {wanted} to keep 99 % of the rows."
    enough = corpus.max_rows is not None  # of the rows that fit, as many as were asked for
    if fit < (1 - MOST_LOST) * tried and not enough:
        findings.refuse("corpus", said + (advice if lengths[-1] > corpus.max_length else "."))
    elif fit < _ENOUGH_FIT * tried and not enough:
        findings.warn("lengths", said + advice)
    else:
        findings.say("lengths", said)
    return fit / tried


def _judge_lost(
    corpus: CorpusConfig, reasons: Mapping[str, int], read: int, kept: int, findings: Findings
) -> None:
    """Refuses a corpus that loses more than a fifth of the rows that were read.

    Nothing is lost where ``corpus.max_rows`` rows stay, because no more were asked for.
    """
    if corpus.max_rows is not None and kept >= corpus.max_rows:
        return
    lost = _not_wanted(reasons)
    if sum(lost.values()) > MOST_LOST * read:
        listed = "; ".join(f"{number} {reason}" for reason, number in sorted(lost.items()))
        findings.refuse(
            "corpus",
            f"{sum(lost.values())} of {read} rows are lost, more than a fifth: {listed}. "
            "Look at the first of them, and change the source, its format or corpus.max_length.",
        )


def _not_wanted(reasons: Mapping[str, int]) -> dict[str, int]:
    """The rows that are lost against a user's wish."""
    return {reason: rows for reason, rows in reasons.items() if not reason.startswith(_WANTED)}


def _judge_validation(config: Config, rows: int, findings: Findings) -> None:
    """Refuses a run that asks for validation rows and gets none."""
    if rows:
        return
    stops = [name for name in ("align", "distill") if getattr(config, name).stop.enabled]
    if config.corpus.validation_fraction > 0:
        findings.refuse(
            "corpus",
            "the validation split has no row, so nothing tells the best checkpoint or when to "
            "stop. Add rows, raise corpus.validation_fraction, or set it to 0 to train without.",
        )
    elif stops:
        findings.warn(
            "validation",
            f"corpus.validation_fraction is 0, so {' and '.join(f'{s}.stop' for s in stops)} "
            "cannot stop training, and the last checkpoint counts as the best",
        )


def judge_counts(config: Config, counts: Mapping[str, Any], findings: Findings) -> None:
    """Refuses a prepared corpus that lost too many rows, or whose validation split is empty.

    Args:
      config: the config of the run.
      counts: ``TokenCorpus.counts``.
      findings: what is refused is added.
    """
    reasons: dict[str, int] = {}
    read = kept = 0
    for label, source in counts["sources"].items():
        if label.startswith("sources."):
            read += source["read"]
            kept += source["kept"]
            for reason, dropped in source["drops"].items():
                reasons[reason] = reasons.get(reason, 0) + dropped["count"]
    _judge_lost(config.corpus, reasons, read, kept, findings)
    _judge_validation(config, counts["splits"]["validation"]["rows"], findings)


def rounded_length(length: int) -> int:
    """The next multiple of 64."""
    return -(-length // 64) * 64
