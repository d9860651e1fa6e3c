"""Proxy-KD whose student also learns on its own answers (beyond the paper).

At a step, with probability ``method.student_share``, the student as it is answers the prompts of
the step's rows, and alpha x KL(proxy || student) over the whole vocabulary is minimised on these
answers, weight 1, without an NLL. The other steps are eq. 11 on the stored soft labels. The answers
are constants: no gradient goes through sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

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
from proxykd_jax.data.collate import Rows
from proxykd_jax.losses import reduce_examples
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.batches import planned_steps
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.objectives import Counts, Metrics, Objective
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState, Tree
from proxykd_jax.types import DistillBatch

# What a step of either kind takes.
Batch = DistillBatch | AnswerBatch


def with_own_answers(run: StageRun, method: ProxyKd, stored: Phase, rows: Rows) -> Phase:
    """Steps of both kinds, by one optimizer; the proxy is loaded beside the student.

    Args:
      run, method: of the stage.
      stored: the phase whose steps all learn from what is on disk.
      rows: its rows.
    """
    distill = run.config.distill
    own = GkdObjective(0.0, 1.0, distill.reduction, distill.alpha)

    def prepare(phase: Phase, trainer: Trainer) -> Phase:
        scorer, spec = load_scorer(run)
        return phase.with_(
            spec=spec,
            frozen=frozen_of(run.model, scorer),
            collate=None,
            make_batch=_make_batch(run, method, stored, rows),
        )

    return stored.with_(
        objective=MixedObjective(stored.objective, own),
        prepare=prepare,
        # Own answers have one term.
        diagnoses=lambda batch: not isinstance(batch, AnswerBatch),
    )


def _make_batch(
    run: StageRun, method: ProxyKd, stored: Phase, rows: Rows
) -> Callable[[TrainState, int], Batch]:
    """A step's rows with their labels, or the answers of the student as it is to their prompts.

    Where rows are packed, a step's own answers are to the prompts of a plan of their own, one a
    place of the batch.
    """
    config, collate = run.config, stored.collate
    assert collate is not None
    answering = Answering.of(run, method, temperature=1.0)
    packed = config.distill.batching == "pack"
    asked = planned_steps(prompt_plan(run, method, rows)[0] if packed else stored.plan)
    planned = planned_steps(stored.plan)

    def make_batch(state: TrainState, step: int) -> Batch:
        if not student_answers(config.seed, step, method.student_share):
            return put_rows(collate(planned(step)), run.mesh)
        student = run.model.at(state.trainable)
        answers = answering.answer(student.weights, read_places(rows, asked(step)), step)
        return put_rows(answer_batch(answers, run.corpus.max_length), run.mesh)

    return make_batch


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
