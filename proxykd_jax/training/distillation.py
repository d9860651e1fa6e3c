"""Distillation of the student (paper, 3.4): NLL of texts, and a scorer's stored distribution.

``fit`` is the whole training of a student on rows that are on disk. Proxy-KD and the methods that
differ from it in their rows, weights or labels alone share it (``proxykd_jax.baselines``).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optax

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.soft_labels import SoftLabelStore, Weights, weights_of
from proxykd_jax.generation.answered import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    ReadLabels,
    answer_positions,
    check_any_rows,
    count_steps,
    distill_collate,
    placed_batches,
    token_collate,
)
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.objectives import DistillObjective, NllObjective, Objective
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import Spec, TrainState, Tree
from proxykd_jax.training.steps import Metrics, Step, make_diagnosis, make_train_step
from proxykd_jax.training.student import StudentRun

FRESH = "fresh"


def teacher_splits(config: Config) -> tuple[str, ...]:
    """Splits of the teacher's answers that the student learns from."""
    return ("distill",) if config.distill.data == "distill" else ("warmup", "align", "distill")


def teacher_rows(config: Config, corpus: TokenCorpus) -> dict[str, Rows]:
    """The teacher's answers that the student learns from.

    Raises:
      UserError: there are none.
    """
    check_any_rows(corpus, teacher_splits(config))
    found: dict[str, Rows] = {name: corpus.split(name) for name in teacher_splits(config)}
    return {name: rows for name, rows in found.items() if len(rows)}


def fresh_rows(config: Config, corpus: TokenCorpus) -> dict[str, Rows]:
    """Fresh prompts with the proxy's answers, after ``score``; empty where there are none."""
    if not len(corpus.split(FRESH)):
        return {}
    store = SampleStore(config.folder / "samples" / FRESH)
    answered = AnsweredSplit(corpus.split(FRESH), store)
    return {FRESH: answered} if len(answered) else {}


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on, and by which loss.

    Attributes:
      rows: of all its splits.
      objective: what is minimised.
      collate: a planned batch of ``rows`` -> what the objective reads.
      figures: reported before the training.
    """

    rows: Joined
    objective: Objective
    collate: Callable[[Any], Any]
    figures: Mapping[str, float]

    def with_figures(self, figures: Mapping[str, float]) -> Lesson:
        """The same with more to report."""
        return dataclasses.replace(self, figures={**self.figures, **figures})


@dataclass(frozen=True)
class DrawnTargets:
    """Targets drawn at random: their log is where a soft label has log-probs.

    Attributes:
      read: what reads them, by split.
      slots: ids a position.
    """

    read: Mapping[str, ReadLabels]
    slots: int


def text_lesson(config: Config, splits: Mapping[str, Rows]) -> Lesson:
    """The NLL of texts alone."""
    rows = Joined(splits)
    objective = NllObjective(config.distill.reduction, config.distill.nll_weight)
    return Lesson(rows, objective, token_collate(rows), {})


def label_lesson(
    config: Config,
    splits: Mapping[str, Rows],
    labels: SoftLabelStore,
    *,
    nll_splits: Collection[str],
    rescale: bool = True,
    drawn: DrawnTargets | None = None,
) -> Lesson:
    """NLL + alpha x weighted KL (eq. 11).

    Args:
      config: of the run.
      splits: rows by name, scored under these names.
      labels: their soft labels.
      nll_splits: whose answers are learnt as texts too; the others have the KL alone, of weight 1.
      rescale: the KL at temperature T is scaled by T^2.
      drawn: targets that take the place of the stored distribution.
    """
    rows, weights = Joined(splits), _weights(config, splits, labels, nll_splits)
    stored = {name: functools.partial(labels.read, name) for name in splits}
    read, top_k = (stored, labels.top_k) if drawn is None else (drawn.read, drawn.slots)
    sample_weights = {name: found.sample_weight for name, found in weights.items()}
    collate = distill_collate(rows, read, sample_weights, nll_splits, top_k=top_k)
    objective = DistillObjective.of(
        config.distill, labels.temperature, rescale=rescale, drawn=drawn is not None
    )
    return Lesson(rows, objective, collate, _weight_figures(weights))


@dataclass(frozen=True)
class Course:
    """The steps that a student's training still has to take; as in ``Trainer.run_phase``.

    Attributes:
      step, diagnose: of one objective.
      batches: that they take.
      from_state: each batch is made from the state that it will train.
    """

    step: Step
    diagnose: Callable[[TrainState, Tree, Any], Metrics] | None
    batches: Iterator[Any]
    from_state: bool = False

    @staticmethod
    def of(
        config: Config,
        spec: Spec,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        batches: Iterator[Any],
        *,
        from_state: bool = False,
    ) -> Course:
        """The course by which an objective is minimised."""
        microbatches = config.distill.microbatches
        step = make_train_step(
            spec, objective, optimizer, microbatches=microbatches, seed=config.seed
        )
        diagnose = None
        if objective.terms():
            diagnose = make_diagnosis(spec, objective, microbatches=microbatches)
        return Course(step, diagnose, batches, from_state)

    def take(self, trainer: Trainer, phase: str, steps: int) -> None:
        """Takes the steps of a phase; ``finish_phase`` must follow."""
        trainer.run_phase(
            phase,
            self.step,
            self.batches,
            steps,
            diagnose=self.diagnose,
            from_state=self.from_state,
        )


# (run, lesson, trainer, plan, steps, optimizer) -> what the steps from the trainer's on are.
MakeCourse = Callable[
    [StudentRun, Lesson, Trainer, Plan, int, optax.GradientTransformation], Course
]


def stored_course(
    run: StudentRun,
    lesson: Lesson,
    trainer: Trainer,
    plan: Plan,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> Course:
    """All steps learn from what is on disk."""
    start = trainer.progress.phase_step
    batches = placed_batches(plan, lesson.collate, start=start, stop=steps, mesh=run.mesh)
    return Course.of(run.config, run.student.spec, lesson.objective, optimizer, batches)


def fit(run: StudentRun, lesson: Lesson, make_course: MakeCourse = stored_course) -> None:
    """Trains the student, or goes on where it was cut off, and marks the stage complete.

    Phase 0 is the look at the untrained student, phase 1 the training.
    """
    distill = run.config.distill
    rows = lesson.rows
    plan = run.plan(rows.lengths - 1, "distill", answers=answer_positions(rows))
    steps = count_steps(plan, distill.epochs, distill.max_steps)
    optimizer = make_optimizer(distill.optimizer, steps)
    trainer = run.open_trainer(optimizer)
    figures = {"rows": len(lesson.rows), "planned_steps": steps, **lesson.figures}
    run.look_at_untrained(trainer, figures)
    if trainer.progress.phase == 1:
        make_course(run, lesson, trainer, plan, steps, optimizer).take(trainer, "train", steps)
        trainer.finish_phase("train", {}, keep=False)
    trainer.finish(run.folder, {"rows": len(lesson.rows)})


def _weights(
    config: Config,
    splits: Mapping[str, Rows],
    labels: SoftLabelStore,
    nll_splits: Collection[str],
) -> dict[str, Weights]:
    """Eq. 9 on each split by itself: the proxy was trained on D_p, so its likelihoods there are
    of another kind. A fresh prompt's answer is the proxy's own: its weight is 1."""
    weight = config.distill.weights
    return {
        name: weights_of(
            labels.seq_logliks(name),
            labels.lengths(name),
            labels.finished(name),
            loglik=weight.loglik,
            normalize=weight.normalize,
            enabled=weight.enabled and name in nll_splits,
        )
        for name in splits
    }


def _weight_figures(weights: Mapping[str, Weights]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, found in weights.items():
        figures[f"weights/{name}/mean"] = float(np.mean(found.sample_weight))
        figures[f"weights/{name}/length_correlation"] = found.length_correlation
        figures[f"weights/{name}/loglik_mean"] = found.loglik_mean
        figures[f"weights/{name}/loglik_std"] = found.loglik_std
    return figures
