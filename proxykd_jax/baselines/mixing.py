"""Proxy-KD with additional learning on the student's own answers (beyond the paper).

With probability ``method.student_share``, the current student answers the prompts of a step's
rows. The step then minimises alpha x KL(proxy || student) over the whole vocabulary on these
answers, with weight 1 and without an NLL. The other steps minimise eq. 11 on the stored soft
labels. The answers are constants: no gradient goes through sampling.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from proxykd_jax.baselines.beside_scorer import ScoredSpec, beside_scorer
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.online import prompt_plan
from proxykd_jax.baselines.rollouts import (
    AnswerBatch,
    Answering,
    answer_batch,
    read_places,
    student_answers,
)
from proxykd_jax.baselines.sampling_programs import (
    scored_answer_program,
    scored_step_program,
    scorer_of,
)
from proxykd_jax.config.methods import ProxyKd
from proxykd_jax.data.collate import Rows
from proxykd_jax.losses import reduce_examples
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.abstract import Program, weight_bytes
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective
from proxykd_jax.training.batches import planned_steps
from proxykd_jax.training.phase import MakeBatch, Phase
from proxykd_jax.training.programs import label_programs
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState, Tree, Weights
from proxykd_jax.types import DistillBatch

# The batches of the two kinds of steps.
Batch = DistillBatch | AnswerBatch


def with_own_answers(run: StageRun, method: ProxyKd, stored: Phase, rows: Rows) -> Phase:
    """Returns a phase with steps of both kinds and one optimizer; it also loads the proxy.

    Args:
      run, method: the stage's run and method.
      stored: the phase whose steps all learn from stored soft labels.
      rows: the rows of this phase.
    """
    distill = run.config.distill
    own = GkdObjective(0.0, 1.0, distill.reduction, distill.alpha)

    return stored.with_(
        objective=MixedObjective(stored.objective, own),
        make_batch=_make_batch(run, method, stored, rows),
        # The objective on own answers has a single term.
        diagnoses=lambda batch: not isinstance(batch, AnswerBatch),
        programs=functools.partial(_programs, run, method, stored, own),
        **beside_scorer(run),
    )


def _programs(
    run: StageRun, method: ProxyKd, stored: Phase, own: GkdObjective, phase: Phase
) -> list[Program]:
    """Returns answers and steps on them, and steps on stored labels, which ignore the scorer."""
    scorer, share = scorer_of(run), method.student_share
    found = [
        scored_answer_program(run, method, phase, times=share),
        scored_step_program(run, phase.with_(objective=own), "own", times=share),
    ]
    if share == 1:
        return found
    held: dict[str, Any] = {
        "times": 1 - share,
        "resident": lambda mesh: weight_bytes(scorer, dict(mesh.shape)),
    }
    return [*label_programs(run, run.config.score.top_k, stored, **held), *found]


def _make_batch(run: StageRun, method: ProxyKd, stored: Phase, rows: Rows) -> MakeBatch:
    """Returns a function that reads a step's rows and labels, or draws the student's answers.

    If rows are packed, a separate plan gives the prompts to answer, one for each place of a batch.
    """
    config, collate = run.config, stored.collate
    packed = config.distill.batching == "pack"
    asked = planned_steps(prompt_plan(run, method, rows)[0] if packed else stored.plan)
    planned = planned_steps(stored.plan)
    answering = Answering.of(run, method, temperature=1.0)

    def make_batch(state: TrainState, frozen: Tree, step: int) -> Batch:
        if not student_answers(config.seed, step, method.student_share):
            assert collate is not None  # a sketch has none
            return put_rows(collate(planned(step)), run.mesh)
        student = run.model.at(state.trainable)
        answers = answering.answer(student, read_places(rows, asked(step)), step)
        return put_rows(answer_batch(answers, run.corpus.max_length), run.mesh)

    return make_batch


@dataclass(frozen=True)
class MixedObjective:
    """The objective for either kind of batch; the metric ``student_share`` is 1 for own answers.

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
        models: dict[str, Weights],
        batch: Batch,
        counts: Counts,
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        if isinstance(batch, AnswerBatch):
            loss, metrics = self.own.share(models, batch, counts, spec, dropout_key)
            return loss, {"own_kl": metrics.pop("divergence"), **metrics}
        student = models["student"]
        loss, metrics = self.stored.share(student, batch, counts, spec.student, dropout_key)
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
