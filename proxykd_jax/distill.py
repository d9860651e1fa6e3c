"""Distil the student by ``method``: Proxy-KD (paper, 3.4) or a method that it is compared with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from proxykd_jax.cli import run_command
from proxykd_jax.config import ConfigLike, as_config

if TYPE_CHECKING:
    from proxykd_jax.training.stage import TrainedStage

SUMMARY = "Distil the student from the teacher's answers and the aligned proxy."


def main(config: ConfigLike) -> TrainedStage:
    """Distils the student of a run and exports it.

    Besides the teacher's answers a method needs nothing, soft labels on disk, or the proxy itself
    (``config.needs``). What is missing is made first. A proxy that is not needed is not loaded. An
    interrupted training continues, and a finished one is not repeated.

    Args:
      config: the run, see ``as_config``.

    Returns:
      The finished stage in ``<run>/student``.

    Raises:
      UserError: a file is missing or does not fit, or the folder was made with other settings.
    """
    config = as_config(config)
    from proxykd_jax import align, prepare, score
    from proxykd_jax.artifacts import open_stage, stage_identity
    from proxykd_jax.baselines import method_of
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.data.soft_labels import open_soft_labels
    from proxykd_jax.evaluation.measures import validation_figures
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.tasks.during import accuracy_while_training
    from proxykd_jax.training.console import Console
    from proxykd_jax.training.exporting import export_student
    from proxykd_jax.training.metrics import open_metrics
    from proxykd_jax.training.model import check_tokenizers, load_for_training, model_identity
    from proxykd_jax.training.restore import aligned_proxy_identity
    from proxykd_jax.training.stage import TrainedStage, training_settings
    from proxykd_jax.training.stage_run import StageRun
    from proxykd_jax.training.times import timed

    corpus = open_corpus(prepare.main(config).folder)
    check_tokenizers(config, corpus)
    folder = config.folder / "student"
    inputs: dict[str, Any] = {"corpus": corpus.identity, "student": model_identity(config.student)}
    labels = None
    if config.needs == "labels":
        labels = open_soft_labels(score.main(config).folder)
        inputs["soft_labels"] = stage_identity(labels.folder)
    elif config.needs == "proxy":
        align.main(config)
        inputs["proxy"] = aligned_proxy_identity(config)
    mesh = make_mesh(config.mesh.of("distill"))
    measure = validation_figures(config.evaluate.batch_size, mesh)
    if not open_stage(folder, "distill", training_settings(config, "distill", "student"), inputs):
        check_rows(config.distill.batch_size, mesh, "distill.batch_size")
        with timed(config.folder, "distill"):
            student = load_for_training(config.student, role="student", seed=config.seed, mesh=mesh)
            if labels is not None:
                labels.check(tokenizer=corpus.tokenizer_digest)
            periodic = accuracy_while_training(config)
            log = open_metrics(config.folder, config.logging, config.model_dump(mode="json"))
            run = StageRun("distill", config, corpus, student, mesh, log, measure, labels, periodic)
            for warning in config.method.warnings():
                Console("distill").say(f"WARNING: {warning}")
            phases = method_of(config).phases(run)
            run.train(phases, untrained="untrained", counts={"rows": len(phases[-1].rows)})
            log.close()
        del student, run, phases, periodic  # the export loads the chosen state
    export_student(config, corpus, mesh, measure)
    return TrainedStage.read(folder)


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    return run_command("distill", main, SUMMARY, argv)


if __name__ == "__main__":
    sys.exit(command())
