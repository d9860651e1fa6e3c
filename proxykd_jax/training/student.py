"""What every method of training a student is given, and how its stage begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optax
from jax.sharding import Mesh

from proxykd_jax.config import Config
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.soft_labels import SoftLabelStore
from proxykd_jax.errors import UserError
from proxykd_jax.training.loop import Measure, Trainer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import Tree


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
    """

    config: Config
    corpus: TokenCorpus
    labels: SoftLabelStore | None
    student: Model
    mesh: Mesh
    log: MetricsLog
    measure: Measure

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

        def student_of(trainable: Tree) -> Model:
            return self.student.at(trainable if beside is None else trainable["student"])

        validation, most = self.corpus.split("validation"), self.config.corpus.validation_max_rows
        return Trainer.open(
            "distill",
            self.folder,
            model,
            optimizer,
            mesh=self.mesh,
            log=self.log,
            every=self.config.distill,
            validate=(lambda state: self.measure(student_of(state.trainable), validation, most))
            if len(validation)
            else None,
        )
