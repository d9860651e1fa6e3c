"""All stages of a run, in the order of the flow."""

from __future__ import annotations

import sys
from pathlib import Path

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config
from proxykd_jax.errors import Stopped
from proxykd_jax.peers import on_first


def main(config: Config) -> Path:
    """Runs the unfinished stages: prepare, align, score, distill, export, evaluate and report.

    Args:
      config: the config of the run.

    Returns:
      The run's folder.

    Raises:
      UserError: a stage raises it.
      Stopped: the run was asked to stop.
    """
    from proxykd_jax import align, distill, evaluate, prepare, score
    from proxykd_jax.data.corpus import open_corpus

    corpus = open_corpus(prepare.main(config).folder)
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


def _report(config: Config) -> None:
    """Writes the page of the run. An error here is printed and does not fail the finished run."""
    from proxykd_jax import report

    try:
        print(f"run: {report.main(config)}", flush=True)
    except Stopped:
        raise
    except Exception as error:
        print(f"run: no report ({error}); python -m proxykd_jax.report tries again", flush=True)


if __name__ == "__main__":
    sys.exit(
        run_command(
            "run", main, "Run all stages, from a file of a teacher's answers to a trained student."
        )
    )
