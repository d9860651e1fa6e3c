"""Align the proxy with the teacher (paper, 3.3): warm-up, then rounds of NLL and preference."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from proxykd_jax.cli import run_command
from proxykd_jax.config import ConfigLike, as_config

if TYPE_CHECKING:
    from proxykd_jax.training.stage import TrainedStage

SUMMARY = "Align the proxy with the teacher's answers."


def main(config: ConfigLike) -> TrainedStage:
    """Aligns the proxy of a run, and exports it if the config says so.

    It makes the corpus first if that is missing, continues an interrupted alignment, and does not
    repeat a finished one.

    Args:
      config: the run, see ``as_config``.

    Returns:
      The finished stage in ``<run>/proxy``.

    Raises:
      UserError: a file is missing or does not fit, or the folder was made with other settings.
    """
    config = as_config(config)
    from proxykd_jax import prepare
    from proxykd_jax.artifacts import open_stage
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.evaluation.measures import validation_figures
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.training.alignment import align_proxy
    from proxykd_jax.training.exporting import export_proxy
    from proxykd_jax.training.metrics import open_metrics
    from proxykd_jax.training.model import check_tokenizers, load_for_training, model_identity
    from proxykd_jax.training.stage import TrainedStage, training_settings
    from proxykd_jax.training.stage_run import StageRun
    from proxykd_jax.training.times import timed

    corpus = open_corpus(prepare.main(config).folder)
    check_tokenizers(config, corpus)
    folder = config.folder / "proxy"
    inputs = {"corpus": corpus.identity, "proxy": model_identity(config.proxy)}
    mesh = make_mesh(config.mesh.of("align"))
    measure = validation_figures(config.evaluate.batch_size, mesh)
    if not open_stage(folder, "align", training_settings(config, "align", "proxy"), inputs):
        check_rows(config.align.batch_size, mesh, "align.batch_size")
        with timed(config.folder, "align"):
            proxy = load_for_training(config.proxy, role="proxy", seed=config.seed, mesh=mesh)
            log = open_metrics(config.folder, config.logging, config.model_dump(mode="json"))
            align_proxy(StageRun("align", config, corpus, proxy, mesh, log, measure))
            log.close()
        del proxy  # the export loads the chosen state
    export_proxy(config, corpus, mesh, measure)
    return TrainedStage.read(folder)


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("align", main, SUMMARY, argv)


if __name__ == "__main__":
    sys.exit(command())
