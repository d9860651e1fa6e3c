"""The inputs of a stage's phases: its config, corpus, model and mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optax
from jax.sharding import Mesh

from proxykd_jax.config import Config, TrainingSection
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.order import Batching
from proxykd_jax.data.soft_labels import SoftLabelStore
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.batch_objectives import NllObjective, Objective
from proxykd_jax.training.batches import (
    Plan,
    answer_positions,
    count_steps,
    make_plan,
    rows_together,
    token_collate,
)
from proxykd_jax.training.loop import Measure, Periodic, Trainer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import text_programs
from proxykd_jax.training.state import Spec, TrainState


@dataclass(frozen=True)
class StageRun:
    """One run of ``align`` or ``distill``, with any method.

    Attributes:
      stage: ``align`` or ``distill``.
      config: config of the run.
      corpus: corpus from ``prepare``.
      model: the proxy or the student as loaded, before any training.
      mesh: mesh of devices.
      log: metrics.jsonl.
      measure: ``(model, rows, most) -> {"nll", "agreement"}`` on held-out rows.
      labels: soft labels from ``score`` if the method needs them (``config.needs``), else None.
      periodic: further figures measured during training.
      scorer: the proxy's shapes if this run is a sketch (``training.sketch``). Nothing is then
        loaded, drawn or trained; its phases are only counted or compiled.
    """

    stage: Literal["align", "distill"]
    config: Config
    corpus: TokenCorpus
    model: Model
    mesh: Mesh
    log: MetricsLog
    measure: Measure
    labels: SoftLabelStore | None = None
    periodic: Periodic[Model] | None = None
    scorer: Model | None = None

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.config.folder / ("proxy" if self.stage == "align" else "student")

    @functools.cached_property
    def sample_mesh(self) -> Mesh:
        """The mesh that draws answers. Weights are moved there for a draw and freed after it.

        Raises:
          UserError: the product of the axes is not the number of devices.
        """
        work = self.config.mesh.drawing(self.stage)
        if self.scorer is not None or work == self.stage:  # a sketch draws nothing
            return self.mesh
        return make_mesh(self.config.mesh.of(work))

    @property
    def section(self) -> TrainingSection:
        """The stage's section of the config."""
        return self.config.align if self.stage == "align" else self.config.distill

    @property
    def stored_labels(self) -> SoftLabelStore:
        """The soft labels; raises UserError if there are none."""
        if self.labels is None:
            raise UserError(f"method {self.config.method.name} needs soft labels; run score.")
        return self.labels

    def unpacked(self) -> Batching:
        """Returns the stage's ``batching`` for rows that cannot be packed: ``bucket`` replaces
        ``pack``."""
        return "bucket" if self.section.batching == "pack" else self.section.batching

    def plan(
        self,
        positions: np.ndarray,
        phase: str,
        *,
        epochs: int,
        most: int | None,
        batch_size: int | None = None,
        packs: bool = True,
        answers: np.ndarray | None = None,
        max_length: int | None = None,
    ) -> Plan:
        """Returns the batches of a phase.

        Args:
          positions: integer[n], positions of each row.
          phase: name that the seed of the order is derived from.
          epochs, most: as in ``count_steps``.
          batch_size: rows per batch (default: the stage's).
          packs: whether rows may be packed together.
          answers: see ``make_plan``.
          max_length: tokens of the longest row (default: the corpus's).
        """
        section = self.section
        batch_size = batch_size or section.batch_size
        return make_plan(
            positions,
            seed=purpose_seed(self.config.seed, phase),
            batch_size=batch_size,
            batching=section.batching if packs else self.unpacked(),
            max_length=max_length or self.corpus.max_length,
            answers=answers,
            together=rows_together(batch_size, section.microbatches, self.mesh),
            epochs=epochs,
            most=most,
        )

    def phase(
        self,
        name: str,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        rows: Rows,
        plan: Plan,
        steps: int,
        *,
        spec: Spec | None = None,
        **fields: Any,
    ) -> Phase:
        """Returns a phase of this stage.

        Args:
          name, objective, optimizer, rows, plan, steps: see ``Phase``.
          spec: what learns and what it reads (default: the model's).
          **fields: further fields of ``Phase``.
        """
        return Phase(
            name=name,
            spec=spec or self.model.spec,
            objective=objective,
            optimizer=optimizer,
            rows=rows,
            plan=plan,
            steps=steps,
            microbatches=self.section.microbatches,
            seed=self.config.seed,
            **{"frozen": self.model.frozen, "trainable": self.model.trainable, **fields},
        )

    def nll_phase(
        self,
        name: str,
        rows: Rows,
        optimizer: Callable[[int], optax.GradientTransformation],
        *,
        order: str,
        epochs: int,
        most: int | None,
        program: str,
        weight: float = 1.0,
        **fields: Any,
    ) -> Phase:
        """Returns a phase that trains on the NLL of texts on disk (eqs. 1, 3 and 7).

        Args:
          name: name of the phase.
          rows: rows with an answer each; with no rows the phase has no steps.
          optimizer: (number of steps) -> optimizer.
          order: name that the seed of the order is derived from.
          epochs, most: number of passes, and the most steps.
          program: name of the step's program.
          weight: weight of the NLL.
          **fields: further fields of ``Phase``.
        """
        options: dict[str, Any] = {"epochs": epochs, "most": most}
        answers = answer_positions(rows) if len(rows) else None
        plan = self.plan(rows.lengths - 1, order, answers=answers, **options)
        steps = count_steps(plan, epochs, most)
        objective = NllObjective(self.section.reduction, weight)
        collate = token_collate(rows)
        return self.phase(
            name,
            objective,
            optimizer(steps),
            rows,
            plan,
            steps,
            collate=collate,
            **{"programs": functools.partial(text_programs, self, program), **fields},
        )

    def watch(self, rows: Rows, state: TrainState, spec: Spec) -> dict[str, float]:
        """Measures the trained model on held-out rows with ``measure``."""
        model = self.model.at(spec.learner(state.trainable))
        return self.measure(model, rows, self.config.corpus.validation_max_rows)

    def train(
        self,
        phases: Sequence[Phase],
        *,
        untrained: str,
        counts: Mapping[str, int],
        optimizer: optax.GradientTransformation | None = None,
        before: Callable[[TrainState], Mapping[str, float]] = lambda state: {},
    ) -> None:
        """Runs the phases, or continues an interrupted run, and marks the stage complete.

        Args:
          phases: the phases in order.
          untrained: name of the evaluation before the first step.
          counts: counts for the manifest.
          optimizer: optimizer of the state; needed only if there are no phases.
          before: further figures of the evaluation before the first step.
        """
        first = phases[0] if phases else None
        spec = first.spec if first else self.model.spec
        periodic = None
        if self.periodic is not None:
            every, figures = self.periodic.every, self.periodic.figures
            periodic = Periodic[TrainState](
                every, lambda state: figures(self.model.at(spec.learner(state.trainable)))
            )
        validation = self.corpus.split("validation")
        trainer = Trainer.open(
            self.stage,
            self.folder,
            first.trainable if first else self.model.trainable,
            first.optimizer if first else optimizer,
            mesh=self.mesh,
            log=self.log,
            every=self.section,
            validate=(lambda state: self.watch(validation, state, spec))
            if len(validation)
            else None,
            periodic=periodic,
        )
        trainer.run(phases, untrained=untrained, before=before)
        trainer.finish(self.folder, counts)
