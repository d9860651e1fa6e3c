"""All stages of a run, in the order of the flow."""

from __future__ import annotations

import sys
from pathlib import Path

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config


def main(config: Config) -> Path:
    """Runs what is not done yet: prepare, align, score, distill, export and evaluate.

    Returns:
      The run's folder.
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
    return config.folder


if __name__ == "__main__":
    sys.exit(run_command("run", main, "Run all stages: from teacher's answers to a student."))
