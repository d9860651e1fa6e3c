"""Turns files of a teacher's answers into rows of tokens, split and readable in any order.

Run it as ``proxykd prepare --config FILE``. It writes ``<run>/corpus`` shard by
shard. After a kill it continues with the missing shards.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.artifacts import digest_file, open_stage, read_manifest, write_bytes
from proxykd_jax.cli import run_command
from proxykd_jax.config import Config, ConfigLike, as_config, dump_config
from proxykd_jax.peers import on_first

if TYPE_CHECKING:
    from proxykd_jax.texts.template import Renderer
    from proxykd_jax.texts.tokenizer import Tokenizer

SUMMARY = "Read the teacher's answers, split them and turn them into tokens."
# Increase it when files give other rows, or rows other tokens, than before.
READING_VERSION = 3


@dataclass(frozen=True)
class PrepareResult:
    """A finished corpus.

    Attributes:
      folder: ``<run>/corpus``; ``data.corpus.open_corpus`` reads it.
      counts: rows read, dropped (with reasons) and kept, by source and by split.
    """

    folder: Path
    counts: dict[str, Any]


def main(config: ConfigLike) -> PrepareResult:
    """Makes the corpus of a run unless it exists. With several processes, process 0 makes it.

    Args:
      config: the run, see ``as_config``.

    Raises:
      UserError: a source or the tokenizer is missing or damaged, no row is left, or the
        folder was made from other sources or settings.
    """
    config = as_config(config)
    folder = config.folder / "corpus"
    on_first(lambda: _prepare(config, folder))
    return PrepareResult(folder, read_manifest(folder)["counts"])


def _prepare(config: Config, folder: Path) -> None:
    from proxykd_jax.data.corpus import corpus_settings
    from proxykd_jax.texts.template import Renderer
    from proxykd_jax.texts.tokenizer import load_tokenizer
    from proxykd_jax.training.times import timed

    run = config.folder
    tokenizer = load_tokenizer(config)
    renderer = Renderer.of(tokenizer, config.corpus)
    inputs = stage_inputs(config, tokenizer, renderer)
    with one_at_a_time(run):
        complete = open_stage(folder, "prepare", corpus_settings(config), inputs)
        if not (run / "config.yaml").exists():
            write_bytes(run / "config.yaml", dump_config(config).encode())
        if not complete:
            with timed(run, "prepare", on_devices=False):
                make_corpus(config, folder, tokenizer, renderer)


def make_corpus(config: Config, folder: Path, tokenizer: Tokenizer, renderer: Renderer) -> None:
    """Reads, selects, splits, encodes and writes; continues what a killed run left.

    Raises:
      UserError: see ``main``.
    """
    from proxykd_jax.data.corpus_writer import CorpusWriter
    from proxykd_jax.texts.encode import encode_rows
    from proxykd_jax.texts.funnel import corpus_counts, describe_counts
    from proxykd_jax.texts.progress import Progress
    from proxykd_jax.texts.records import Drops
    from proxykd_jax.texts.selection import nothing_left, select_rows, selected_rows

    writer = CorpusWriter(folder)
    if config.corpus.beam is not None:
        from proxykd_jax.texts.beam.make import write_with_beam

        read, fraction = write_with_beam(config.corpus, tokenizer.path, writer)
        writer = CorpusWriter(folder)
    else:
        with Progress() as progress:
            selection = select_rows(config.corpus, renderer, progress)
            encode_rows(
                selected_rows(config.corpus, selection, renderer),
                renderer,
                writer,
                max_length=config.corpus.max_length,
                shard_rows=config.corpus.shard_rows,
                progress=progress,
            )
        read, fraction = selection.sources, selection.validation_fraction
    counts = corpus_counts(config.corpus, read, fraction, writer)
    sources = counts["sources"]
    if not any(sources[label]["kept"] for label in sources if label.startswith("sources.")):
        writer.discard()  # so that the same folder serves another template or max_length
        raise nothing_left({k: Drops.from_json(v["drops"]) for k, v in sources.items()})
    print(describe_counts(counts))
    writer.finish(
        counts,
        tokenizer={
            "path": tokenizer.path,
            "digest": tokenizer.digest,
            "vocab_size": tokenizer.vocab_size,
        },
        end_token_ids=renderer.end_token_ids,
    )


@contextlib.contextmanager
def one_at_a_time(run: Path) -> Iterator[None]:
    """Lets one command at a time make the corpus of a run; others wait and then find it complete.

    The operating system releases the lock when its process ends, for whatever reason.
    """
    import fcntl

    run.mkdir(parents=True, exist_ok=True)
    with open(run / ".prepare.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def stage_inputs(config: Config, tokenizer: Tokenizer, renderer: Renderer) -> dict[str, Any]:
    """The corpus's inputs: tokenizer, template, and every file by size and digest."""
    return {
        "reading_version": READING_VERSION,
        "tokenizer": tokenizer.digest,
        "template": renderer.template_digest,
        "end_tokens": list(renderer.end_token_ids),
        "files": {
            str(path): {"bytes": path.stat().st_size, "digest": digest_file(path)}
            for path in source_files(config)
        },
    }


def source_files(config: Config) -> list[Path]:
    """All files that the corpus is read from. Hub datasets are identified by the config's names.

    Raises:
      UserError: a path matches nothing.
    """
    from proxykd_jax.texts.files import list_files
    from proxykd_jax.texts.files import source_files as list_source

    corpus = config.corpus
    files: list[Path] = []
    groups = ((corpus.sources, False), (corpus.test, True), (corpus.fresh_prompts, False))
    for source, held_out in ((source, held_out) for some, held_out in groups for source in some):
        if source.path is not None:
            files += list_source(source.path, held_out=held_out).files
        if source.answers is not None:
            files += list_files(source.answers)
        for place in (source.dataset, source.tfds):
            if place is not None and Path(place).is_dir():
                files += sorted(path for path in Path(place).rglob("*") if path.is_file())
    for pattern in corpus.benchmarks:
        files += list_files(pattern)
    return list(dict.fromkeys(files))


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("prepare", main, SUMMARY, argv)


if __name__ == "__main__":
    sys.exit(command())
