"""All stages of a run, in the order of the flow."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import MANIFEST
from proxykd_jax.cli import FORCE, run_command
from proxykd_jax.config import Config, ConfigLike, as_config
from proxykd_jax.errors import Stopped
from proxykd_jax.peers import is_first, on_first
from proxykd_jax.status import LINE

SUMMARY = "Run all stages, from a file of a teacher's answers to a trained student."


def main(config: ConfigLike, *, force: bool = False) -> Path:
    """Runs the unfinished stages: prepare, align, score, distill, export, evaluate and report.

    A run that has no corpus yet is checked first, so that what would stop a later stage stops at
    once. The corpus is judged before anything is trained.

    Args:
      config: the run, see ``as_config``.
      force: warn of a corpus that loses many rows or lacks validation rows, instead of refusing it.

    Returns:
      The run's folder.

    Raises:
      UserError: a check fails, or a stage raises it.
      Stopped: the run was asked to stop.
    """
    config = as_config(config)
    from proxykd_jax import align, distill, evaluate, prepare, score
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.training.costs import stage_costs

    on_first(lambda: _check_files(config, force))
    prepared = prepare.main(config)
    on_first(lambda: _check_corpus(config, prepared.counts, force))
    corpus = open_corpus(prepared.folder)
    if is_first() and LINE.enabled:
        LINE.plan(stage_costs(config, corpus))
    if config.needs != "nothing":
        align.main(config)
    if config.needs == "labels":
        score.main(config)
    distill.main(config)
    if len(corpus.split("validation")) or len(corpus.split("test")):
        evaluate.main(config)
    else:
        print("run: no validation or test rows, so nothing is evaluated", flush=True)
    on_first(lambda: _report(config))
    return config.folder


def _check_files(config: Config, force: bool) -> None:
    from proxykd_jax.checking import check_start

    if not (config.folder / "corpus" / MANIFEST).exists():
        check_start(config, force=force)


def _check_corpus(config: Config, counts: Mapping[str, Any], force: bool) -> None:
    from proxykd_jax.checking import judge_corpus

    if not any((config.folder / stage).exists() for stage in ("proxy", "student")):
        judge_corpus(config, counts, force=force)


def _report(config: Config) -> None:
    """Writes the page of the run. An error here is printed and does not fail the finished run."""
    from proxykd_jax import report

    try:
        print(f"run: {report.main(config)}", flush=True)
    except Stopped:
        raise
    except Exception as error:
        print(f"run: no report ({error}); proxykd report tries again", flush=True)


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("run", main, SUMMARY, argv, flags=FORCE)


if __name__ == "__main__":
    sys.exit(command())
