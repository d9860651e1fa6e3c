"""What every method of training a student is given, and how its stage begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import optax
from jax.sharding import Mesh

from proxykd_jax.config import Config
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.soft_labels import SoftLabelStore
from proxykd_jax.errors import UserError
from proxykd_jax.training.batches import Plan, make_plan, phase_seed, rows_together
from proxykd_jax.training.loop import Measure, Periodic, Trainer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import TrainState, Tree


@dataclass(frozen=True)
class StudentRun:
    """One run of ``distill``, of whatever method.

    Attributes:
      config: of the run.
      corpus: from ``prepare``.
      labels: from ``score``, where the method needs soft labels (``config.needs``); else None.
      student: as loaded, before any training.
      mesh: of devices.
      log: metrics.jsonl.
      measure: ``(model, rows, most) -> {"nll", "agreement"}`` on held-out rows.
      periodic: what else is looked at while the student is trained.
    """

    config: Config
    corpus: TokenCorpus
    labels: SoftLabelStore | None
    student: Model
    mesh: Mesh
    log: MetricsLog
    measure: Measure
    periodic: Periodic[Model] | None = None

    @property
    def folder(self) -> Path:
        """Of the stage."""
        return self.config.folder / "student"

    @property
    def stored_labels(self) -> SoftLabelStore:
        """The soft labels of a method that needs them."""
        if self.labels is None:
            raise UserError(f"method {self.config.method.name} needs soft labels; run score.")
        return self.labels

    def plan(
        self,
        positions: np.ndarray,
        phase: str,
        *,
        batch_size: int | None = None,
        packs: bool = True,
        answers: np.ndarray | None = None,
        max_length: int | None = None,
    ) -> Plan:
        """The batches of a phase.

        Args:
          positions: of each row.
          phase: names the seed of the order.
          batch_size: rows a batch (default: ``distill.batch_size``).
          packs: whether rows can be packed together; else ``batching: pack`` groups by length.
          answers: see ``make_plan``.
          max_length: tokens of the longest row (default: the corpus's).
        """
        distill = self.config.distill
        batch_size = batch_size or distill.batch_size
        return make_plan(
            positions,
            seed=phase_seed(self.config.seed, phase),
            batch_size=batch_size,
            batching="bucket" if distill.batching == "pack" and not packs else distill.batching,
            max_length=max_length or self.corpus.max_length,
            answers=answers,
            together=rows_together(batch_size, distill.microbatches, self.mesh),
            epochs=distill.epochs,
            most=distill.max_steps,
        )

    def look_at_untrained(self, trainer: Trainer, figures: Mapping[str, float]) -> None:
        """Phase 0: a look before any training; also the checkpoint of step 0."""
        for warning in self.config.method.warnings():
            trainer.console.say(f"WARNING: {warning}")
        if trainer.progress.phase == 0:
            trainer.check_validation("untrained")
            trainer.look("untrained")
            trainer.finish_phase("untrained", dict(figures), keep=True)

    def open_trainer(
        self, optimizer: optax.GradientTransformation, beside: Mapping[str, Tree] | None = None
    ) -> Trainer:
        """The stage's trainer, at its newest checkpoint or at its beginning.

        Args:
          optimizer: of the state.
          beside: what else learns, by name; what learns is then ``{"student": ..., **beside}``.
        """
        model = self.student
        if beside is not None:
            model = model.at({"student": model.trainable, **beside})

        def student_of(state: TrainState) -> Model:
            learnt = state.trainable
            return self.student.at(learnt if beside is None else learnt["student"])

        periodic = None
        if self.periodic is not None:
            every, figures = self.periodic.every, self.periodic.figures
            periodic = Periodic[TrainState](every, lambda state: figures(student_of(state)))
        validation, most = self.corpus.split("validation"), self.config.corpus.validation_max_rows
        return Trainer.open(
            "distill",
            self.folder,
            model,
            optimizer,
            mesh=self.mesh,
            log=self.log,
            every=self.config.distill,
            validate=(lambda state: self.measure(student_of(state), validation, most))
            if len(validation)
            else None,
            periodic=periodic,
        )
