"""Distil the student (paper, 3.4): the teacher's answers, and the aligned proxy's distribution."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from proxykd_jax.cli import run_command
from proxykd_jax.config import Config

if TYPE_CHECKING:
    from proxykd_jax.training.stage import TrainedStage


def main(config: Config) -> TrainedStage:
    """Distils the student, or goes on where a run was cut off; makes what it needs first.

    With ``distill.alpha: 0`` the student is fine-tuned on the teacher's answers alone, and no
    proxy is loaded.

    Raises:
      UserError: a file is missing or does not fit, or the folder was made with other settings.
    """
    from proxykd_jax import prepare, score
    from proxykd_jax.artifacts import open_stage, stage_identity
    from proxykd_jax.data.corpus import open_corpus
    from proxykd_jax.data.soft_labels import open_soft_labels
    from proxykd_jax.evaluation.measures import validation_figures
    from proxykd_jax.parallel.mesh import make_mesh
    from proxykd_jax.parallel.sharding import check_rows
    from proxykd_jax.training.distillation import Distillation
    from proxykd_jax.training.exporting import export_student
    from proxykd_jax.training.metrics import open_metrics
    from proxykd_jax.training.model import check_tokenizers, load_for_training, model_identity
    from proxykd_jax.training.stage import TrainedStage, training_settings

    corpus = open_corpus(prepare.main(config).folder)
    check_tokenizers(config, corpus)
    folder = config.folder / "student"
    inputs = {"corpus": corpus.identity, "student": model_identity(config.student)}
    labels = None
    if config.distill.alpha > 0:
        labels = open_soft_labels(score.main(config).folder)
        inputs["soft_labels"] = stage_identity(labels.folder)
    mesh = make_mesh(config.mesh.of("distill"))
    measure = validation_figures(config.evaluate.batch_size, mesh)
    if not open_stage(folder, "distill", training_settings(config, "distill", "student"), inputs):
        check_rows(config.distill.batch_size, mesh, "distill.batch_size")
        student = load_for_training(config.student, role="student", seed=config.seed, mesh=mesh)
        if labels is not None:
            labels.check(tokenizer=corpus.tokenizer_digest)
        log = open_metrics(config.folder, config.logging, config.model_dump(mode="json"))
        run = Distillation(config, corpus, labels, student, mesh, log, measure)
        run.look_at_untrained_student()
        run.train()
        run.finish()
        log.close()
    export_student(config, corpus, mesh, measure)
    return TrainedStage.read(folder)


if __name__ == "__main__":
    sys.exit(run_command("distill", main, "Distil the student from teacher and aligned proxy."))
