"""Score the teacher's answers with the aligned proxy (paper, 3.4 and A.1).

It stores the proxy's top-k log-probs of every answer token. First it lets the proxy answer the
fresh prompts, if there are any.

Run it as ``proxykd score --config FILE``. It writes ``<run>/samples/fresh`` and
``<run>/soft_labels`` part by part. After a kill the same command continues, and the files end up
the same, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.cli import run_command
from proxykd_jax.config import ConfigLike, as_config

SUMMARY = "Store the aligned proxy's soft labels."


@dataclass(frozen=True)
class ScoreResult:
    """A finished store of soft labels.

    Attributes:
      folder: ``<run>/soft_labels``; ``data.soft_labels.open_soft_labels`` reads it.
      loglik_mean, loglik_std: mu and gamma of eq. 9 over D_s in nats, for the kind of
        log-likelihood that ``distill.weights.loglik`` names.
      weight_length_correlation: Pearson correlation of these weights with the answers' lengths.
      figures: for each split the number of rows and tokens, the share of positions whose top-k mass
        exceeds 0.95 (Fig. 4), and the three figures above for both kinds of log-likelihood.
    """

    folder: Path
    loglik_mean: float
    loglik_std: float
    weight_length_correlation: float
    figures: dict[str, dict[str, Any]]


def main(config: ConfigLike) -> ScoreResult:
    """Scores all answers that the student will see.

    It aligns the proxy first if necessary, continues an interrupted scoring, and does not repeat a
    finished one.

    Args:
      config: the run, see ``as_config``.

    Raises:
      UserError: a file is missing or does not fit, or the folder was made with other settings or
        by another proxy.
    """
    config = as_config(config)
    from proxykd_jax import align, prepare
    from proxykd_jax.baselines import method_of
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.data.soft_labels import open_soft_labels
    from proxykd_jax.training.metrics import open_metrics
    from proxykd_jax.training.scoring import Scoring
    from proxykd_jax.training.times import timed

    corpus = open_corpus(prepare.main(config).folder)
    align.main(config)
    run = Scoring(config, corpus)
    splits = method_of(config).to_score(run)
    if not run.begin(splits):
        with timed(config.folder, "score"):
            for name, rows in splits.items():
                run.score(name, rows)
            log = open_metrics(config.folder, config.logging, config.model_dump(mode="json"))
            run.finish(splits, log)
            log.close()
    figures = open_soft_labels(run.folder).figures
    kind = config.distill.weights.loglik
    distill = figures.get("distill", {})
    return ScoreResult(
        run.folder,
        distill.get(f"{kind}/loglik_mean", 0.0),
        distill.get(f"{kind}/loglik_std", 0.0),
        distill.get(f"{kind}/weight_length_correlation", 0.0),
        figures,
    )


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("score", main, SUMMARY, argv)


if __name__ == "__main__":
    sys.exit(command())
