"""Proxy-KD whose student also learns on its own answers (beyond the paper).

At a step, with probability ``method.student_share``, the student as it is answers the prompts of
the step's rows, and alpha x KL(proxy || student) over the whole vocabulary is minimised on these
answers, weight 1, without an NLL. The other steps are eq. 11 on the stored soft labels. The answers
are constants: no gradient goes through sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.online import prompt_plan
from proxykd_jax.baselines.rollouts import (
    AnswerBatch,
    Answering,
    answer_batch,
    read_places,
    student_answers,
)
from proxykd_jax.baselines.scored import ScoredSpec, frozen_of, load_scorer
from proxykd_jax.config.methods import ProxyKd
from proxykd_jax.data.stream import BatchStream
from proxykd_jax.losses import reduce_examples
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.batches import Plan, planned_steps
from proxykd_jax.training.distillation import Course, Lesson
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.objectives import Counts, Metrics, Objective
from proxykd_jax.training.state import TrainState, Tree
from proxykd_jax.training.student import StudentRun
from proxykd_jax.types import DistillBatch

# What a step of either kind takes.
Batch = DistillBatch | AnswerBatch


def mixed_course(
    run: StudentRun,
    lesson: Lesson,
    trainer: Trainer,
    plan: Plan,
    steps: int,
    optimizer: optax.GradientTransformation,
) -> Course:
    """Steps of both kinds, by one optimizer; the proxy is loaded beside the student."""
    config = run.config
    scorer, spec = load_scorer(run)
    trainer.frozen = frozen_of(run.student, scorer)
    objective = MixedObjective(
        lesson.objective,
        GkdObjective(0.0, 1.0, config.distill.reduction, config.distill.alpha),
    )
    batches = _batches(run, lesson, trainer, plan, steps)
    course = Course.of(config, spec, objective, optimizer, batches, from_state=True)
    stored_terms = course.diagnose

    def diagnose(state: TrainState, frozen: Tree, batch: Batch) -> dict[str, jax.Array]:
        # Own answers have one term.
        if stored_terms is None or isinstance(batch, AnswerBatch):
            return {}
        return stored_terms(state, frozen, batch)

    return dataclasses.replace(course, diagnose=diagnose)


def _batches(
    run: StudentRun, lesson: Lesson, trainer: Trainer, plan: Plan, steps: int
) -> Iterator[Batch]:
    """A step's rows with their labels, or the answers of the student as it is to their prompts.

    Where rows are packed, a step's own answers are to the prompts of a plan of their own, one a
    place of the batch.
    """
    config, method, mesh = run.config, run.config.method, run.mesh
    assert isinstance(method, ProxyKd)
    answering = Answering.of(run, method, temperature=1.0)
    packed = config.distill.batching == "pack"
    asked = BatchStream(prompt_plan(run, method, lesson.rows)[0] if packed else plan, lambda x: x)
    start = trainer.progress.phase_step
    for step, planned in planned_steps(plan, start=start, stop=steps):
        if student_answers(config.seed, step, method.student_share):
            student = run.student.at(trainer.state.trainable)
            places = read_places(lesson.rows, asked.planned(step))
            answers = answering.answer(student.weights, places, step)
            yield put_rows(answer_batch(answers, run.corpus.max_length), mesh)
        else:
            yield put_rows(lesson.collate(planned), mesh)


@dataclass(frozen=True)
class MixedObjective:
    """The objective of a batch's kind; ``student_share`` in the metrics is 1 for own answers.

    Attributes:
      stored: eq. 11.
      own: alpha x KL(proxy || student) on own answers.
    """

    stored: Objective
    own: GkdObjective

    def counts(self, batch: Batch) -> Counts:
        objective: Objective = self.own if isinstance(batch, AnswerBatch) else self.stored
        return objective.counts(batch)

    def share(
        self,
        params: Tree,
        adapter: Tree | None,
        batch: Batch,
        counts: Counts,
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        if isinstance(batch, AnswerBatch):
            loss, metrics = self.own.share(params, adapter, batch, counts, spec, dropout_key)
            return loss, {"own_kl": metrics.pop("divergence"), **metrics}
        own, own_adapter = params["student"]
        loss, metrics = self.stored.share(
            own, own_adapter, batch, counts, spec.student, dropout_key
        )
        there_BS = batch.rows.example_mask_BS
        return loss, {
            **metrics,
            "student_share": reduce_examples(jnp.zeros_like(there_BS), there_BS),
        }

    def terms(self) -> dict[str, Objective]:
        return {
            name: dataclasses.replace(self, stored=term)
            for name, term in self.stored.terms().items()
        }
