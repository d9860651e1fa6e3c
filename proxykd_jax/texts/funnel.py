"""Counts the rows that were read, the reasons for dropping some, and the splits of the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from proxykd_jax.config import CorpusConfig
from proxykd_jax.data.corpus import SPLITS, earlier_lengths
from proxykd_jax.data.corpus_writer import CorpusWriter
from proxykd_jax.texts.files import source_files
from proxykd_jax.texts.records import Drops, Notes
from proxykd_jax.texts.selection import SourceCount, source_label

_SHARES = ("warmup", "align", "distill")
_FILES_SHOWN, _FILES_KEPT = 5, 100


def corpus_counts(
    corpus: CorpusConfig,
    read: Mapping[str, SourceCount],
    validation_fraction: float,
    writer: CorpusWriter,
) -> dict[str, Any]:
    """The counts of a corpus whose shards are all committed, as JSON.

    Args:
      corpus: the section of the config.
      read: counts of each source before tokenisation, by its label.
      validation_fraction: the share that was set aside.
      writer: the corpus's writer.

    Returns:
      ``sources``: by label, rows ``read`` and ``kept``, ``drops`` by reason, ``notes`` about the
      rows, and files ``passed_over``. ``splits``: by
      name, ``rows``, ``tokens``, ``answer_tokens``, and the ``expected_share`` of the rows that
      validation leaves. ``validation_fraction``: the share that was set aside.
    """
    passed_over = files_passed_over(corpus)
    drops = {label: Drops() for label in read}
    notes = {label: Notes() for label in read}
    for label, count in read.items():
        drops[label].merge(count.drops)
        notes[label].merge(count.notes)
    kept = dict.fromkeys(read, 0)
    splits: dict[str, dict[str, Any]] = {}
    for split in SPLITS:
        rows = tokens = answers = 0
        for part in writer.parts(split):
            lengths, prompts = part.arrays["lengths"], part.arrays["prompt_lengths"]
            rows += len(lengths)
            tokens += int(lengths.sum(dtype="int64"))
            answers += int((lengths - prompts + earlier_lengths(part.arrays)).sum(dtype="int64"))
            for label, number in part.metadata["sources"].items():
                kept[label] += number
            for label, dropped in part.metadata["drops"].items():
                drops[label].merge(Drops.from_json(dropped))
            for label, noted in part.metadata.get("notes", {}).items():
                notes[label].merge(Notes.from_json(noted))
        splits[split] = {"rows": rows, "tokens": tokens, "answer_tokens": answers}
        if split in _SHARES:
            splits[split]["expected_share"] = getattr(corpus.shares, split)
    sources = {
        label: {
            "read": count.read,
            "kept": kept[label],
            "drops": drops[label].as_json(),
            "notes": notes[label].as_json(),
            "passed_over": passed_over.get(label, {}),
        }
        for label, count in read.items()
    }
    return {
        "sources": sources,
        "splits": splits,
        "validation_fraction": validation_fraction,
    }


def files_passed_over(corpus: CorpusConfig) -> dict[str, dict[str, str]]:
    """By source, the first files of its folder that are not read, with the reasons."""
    groups = {"test": corpus.test, "sources": corpus.sources, "fresh_prompts": corpus.fresh_prompts}
    found: dict[str, dict[str, str]] = {}
    for group, sources in groups.items():
        for index, source in enumerate(sources):
            if source.path is not None:
                files = source_files(source.path, held_out=group == "test").passed_over
                kept = dict(list(files.items())[:_FILES_KEPT])
                if len(files) > len(kept):
                    kept[f"{len(files) - len(kept):,} more files"] = "not listed here"
                found[source_label(group, index, source)] = kept
    return found


def describe_passed_over(files: Mapping[str, str]) -> str:
    """One line about files that are not read."""
    listed = ", ".join(f"{name} ({why})" for name, why in list(files.items())[:_FILES_SHOWN])
    more = len(files) - _FILES_SHOWN
    return f"{counted(len(files), 'file')} passed over: {listed}" + (
        f" and {more:,} more" if more > 0 else ""
    )


def counted(number: int, noun: str) -> str:
    """A number with its noun: ``1 row``, ``2,000 rows``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def describe_notes(notes: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A line for each note, the most frequent first."""
    for note, found in sorted(notes.items(), key=lambda item: -item[1]["count"]):
        example = f": {found['example']!r}" if found["example"] else ""
        yield f"{counted(found['count'], 'row')}: {note} (first {found['first']}{example})"


def describe_counts(counts: dict[str, Any]) -> str:
    """The counts as text."""
    lines = ["rows by source"]
    for label, source in counts["sources"].items():
        lines.append(f"  {label}: {source['read']:,} read, {source['kept']:,} kept")
        reasons = sorted(source["drops"].items(), key=lambda item: -item[1]["count"])
        for reason, dropped in reasons:
            lines.append(f"    {dropped['count']:,} left out: {reason} ({dropped['first'][0]})")
        lines += [f"    {line}" for line in describe_notes(source["notes"])]
        if source["passed_over"]:
            lines.append(f"    {describe_passed_over(source['passed_over'])}")
    lines.append("rows by split")
    shared = sum(counts["splits"][split]["rows"] for split in _SHARES)
    held_out = counts["splits"]["validation"]["rows"]
    for name, split in counts["splits"].items():
        note = ""
        if name in _SHARES and shared:
            note = f"; {split['rows'] / shared:.1%}, {split['expected_share']:.1%} expected"
        elif name == "validation":
            share = held_out / max(shared + held_out, 1)
            note = f"; {share:.1%}, {counts['validation_fraction']:.1%} expected"
        lines.append(
            f"  {name}: {split['rows']:,} rows, {split['tokens']:,} tokens, "
            f"{split['answer_tokens']:,} of them in answers{note}"
        )
    return "\n".join(lines)
