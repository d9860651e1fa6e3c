"""Distillation of the student (paper, 3.4): the pieces that ``distill.main`` puts in order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.soft_labels import SoftLabelStore, weights_of
from proxykd_jax.generation.answered import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.training.batches import (
    Joined,
    check_any_rows,
    count_steps,
    distill_collate,
    make_plan,
    phase_seed,
    placed_batches,
    token_collate,
)
from proxykd_jax.training.loop import Measure, Trainer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.objectives import DistillObjective, NllObjective, Objective
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.steps import make_diagnosis, make_train_step

FRESH = "fresh"


def teacher_splits(config: Config) -> tuple[str, ...]:
    """Splits of the teacher's answers that the student learns from."""
    return ("distill",) if config.distill.data == "distill" else ("warmup", "align", "distill")


class Distillation:
    """One run of the stage. Phase 0 is the look at the untrained student, phase 1 the training.

    Args:
      config: of the run.
      corpus: from ``prepare``.
      labels: from ``score``; None with ``alpha: 0``, which is plain fine-tuning on the teacher's
        answers and touches no proxy.
      model: the student, as loaded.
      mesh: of devices.
      log: metrics.jsonl.
      measure: ``(model, rows, most) -> {"nll", "agreement"}`` on held-out rows.

    Raises:
      UserError: there are no rows to learn from.
    """

    def __init__(
        self,
        config: Config,
        corpus: TokenCorpus,
        labels: SoftLabelStore | None,
        model: Model,
        mesh: Mesh,
        log: MetricsLog,
        measure: Measure,
    ) -> None:
        self._config, self._distill = config, config.distill
        self._corpus, self._labels, self._model, self._mesh = corpus, labels, model, mesh
        self._folder = config.folder / "student"
        check_any_rows(corpus, teacher_splits(config))
        self._rows = Joined(self._splits)
        self._plan = make_plan(
            self._rows.lengths - 1,
            seed=phase_seed(config.seed, "distill"),
            batch_size=self._distill.batch_size,
            batching=self._distill.batching,
            max_length=corpus.max_length,
        )
        self._steps = count_steps(self._plan, self._distill.epochs, self._distill.max_steps)
        self._optimizer = make_optimizer(self._distill.optimizer, self._steps)
        validation = corpus.split("validation")
        most = config.corpus.validation_max_rows
        self._trainer = Trainer.open(
            "distill",
            self._folder,
            model,
            self._optimizer,
            mesh=mesh,
            log=log,
            every=self._distill,
            validate=(lambda state: measure(model.at(state.trainable), validation, most))
            if len(validation)
            else None,
        )

    def look_at_untrained_student(self) -> None:
        """Figures before any training, and those of the weights."""
        if self._trainer.progress.phase == 0:
            self._trainer.check_validation("untrained")
            self._trainer.finish_phase("untrained", self._data_figures(), keep=True)

    def train(self) -> None:
        """NLL + alpha x weighted KL (eq. 11), or NLL alone."""
        if self._trainer.progress.phase > 1:
            return
        objective, collate = self._objective_and_collate()
        step = make_train_step(
            self._model.spec,
            objective,
            self._optimizer,
            microbatches=self._distill.microbatches,
            seed=self._config.seed,
        )
        diagnosis = make_diagnosis(
            self._model.spec, objective, microbatches=self._distill.microbatches
        )
        start = self._trainer.progress.phase_step
        self._trainer.run_phase(
            "train",
            step,
            placed_batches(self._plan, collate, start=start, stop=self._steps, mesh=self._mesh),
            self._steps,
            diagnose=diagnosis if objective.terms() else None,
        )
        self._trainer.finish_phase("train", {}, keep=False)

    def finish(self) -> None:
        """Marks the stage complete."""
        self._trainer.finish(self._folder, {"rows": len(self._rows)})

    @functools.cached_property
    def _splits(self) -> dict[str, Rows]:
        splits: dict[str, Rows] = {
            name: self._corpus.split(name) for name in teacher_splits(self._config)
        }
        if self._labels is not None and len(self._corpus.split(FRESH)):
            store = SampleStore(self._config.folder / "samples" / FRESH)
            splits[FRESH] = AnsweredSplit(self._corpus.split(FRESH), store)
        return {name: rows for name, rows in splits.items() if len(rows)}

    @functools.cached_property
    def _weights(self) -> dict[str, Any]:
        """Eq. 9 on each split by itself: the proxy was trained on D_p, so its likelihoods there
        are of another kind. A fresh prompt's answer is the proxy's own: its weight is 1."""
        assert self._labels is not None
        weight = self._distill.weights
        return {
            name: weights_of(
                self._labels.seq_logliks(name),
                self._labels.lengths(name),
                self._labels.finished(name),
                loglik=weight.loglik,
                normalize=weight.normalize,
                enabled=weight.enabled and name != FRESH,
            )
            for name in self._splits
        }

    def _objective_and_collate(self) -> tuple[Objective, Callable[[Any], Any]]:
        if self._labels is None:
            objective = NllObjective(self._distill.reduction, self._distill.nll_weight)
            return objective, token_collate(self._rows)
        weights = {name: found.sample_weight for name, found in self._weights.items()}
        collate = distill_collate(self._rows, self._labels, weights, teacher_splits(self._config))
        return DistillObjective.of(self._distill, self._labels.temperature), collate

    def _data_figures(self) -> dict[str, float]:
        figures: dict[str, float] = {"rows": len(self._rows), "planned_steps": self._steps}
        if self._labels is None:
            return figures
        for name, found in self._weights.items():
            figures[f"weights/{name}/mean"] = float(np.mean(found.sample_weight))
            figures[f"weights/{name}/length_correlation"] = found.length_correlation
            figures[f"weights/{name}/loglik_mean"] = found.loglik_mean
            figures[f"weights/{name}/loglik_std"] = found.loglik_std
        return figures
