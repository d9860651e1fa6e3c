"""A phase describes, as one value, what is trained between two checkpoints.

A stage is a list of phases, such as a warm-up, a round of alignment or a student's training. The
trainer runs a phase (``training.loop``), ``--dry-run`` counts it, ``plan`` compiles it, and a
checkpoint refers to it by its number in the list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optax

from proxykd_jax.training.batch_objectives import Objective
from proxykd_jax.training.state import Spec, TrainState, Tree
from proxykd_jax.training.steps import Metrics, Step, make_diagnosis, make_train_step

if TYPE_CHECKING:
    from proxykd_jax.data.collate import Rows
    from proxykd_jax.data.order import PlannedBatch
    from proxykd_jax.training.abstract import Program
    from proxykd_jax.training.batches import Plan
    from proxykd_jax.training.checkpoint import Progress
    from proxykd_jax.training.loop import Trainer


# (state, frozen, step of the phase) -> a batch on the devices.
MakeBatch = Callable[[TrainState, Tree, int], Any]


def _nothing(*_: Any) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Phase:
    """A part of a stage's training, from one checkpoint to the next.

    Attributes:
      name: name in the log and in the manifest.
      spec: the static half of the models that a step reads.
      objective: what a step minimises.
      optimizer: if it is the same object as in the phase before, its state is kept; otherwise its
        state starts anew.
      rows: rows that are learnt from, or whose prompts are answered.
      plan: the batches of each epoch.
      steps: steps taken if nothing stops earlier; 0 skips the phase's steps.
      microbatches: number of parts that a batch is computed in.
      seed: seed of the run.
      frozen: weights that do not learn, as ``spec.bind`` takes them.
      trainable: what learns, before the first step of the stage's first phase.
      collate: (planned batch) -> arrays of a step, for batches that are on disk.
      make_batch: ``(state, frozen, step) -> batch`` on the devices, for batches that are made from
        the state that they train. One of ``collate`` and ``make_batch`` is None.
      prepare: reads or computes what the next step needs. It is called once per process, with the
        trainer at the phase's first step or at the step where it resumes.
      before: figures of the untrained state, logged before the stage's first step.
      after: figures of the phase's final state; names ``time/...`` go to the log alone.
      keep: whether the checkpoint at the end of the phase is never removed.
      ends_stage: whether the stage ends after this phase.
      check_first: checks the metrics of the phase's first step; raises if they are wrong.
      diagnoses: whether a batch is used to measure the gradient norms of the loss's terms.
      make_step: makes a step of several updates instead of one.
      programs: the programs that the phase starts, for ``plan``; set in a sketch alone.
    """

    name: str
    spec: Spec
    objective: Objective
    optimizer: optax.GradientTransformation
    rows: Rows
    plan: Plan
    steps: int
    microbatches: int
    seed: int
    frozen: Tree
    trainable: Tree
    collate: Callable[[PlannedBatch], Any] | None = None
    make_batch: MakeBatch | None = None
    prepare: Callable[[Phase, Trainer], Phase] | None = None
    before: Callable[[TrainState], Mapping[str, float]] = _nothing
    after: Callable[[TrainState], Mapping[str, float]] = _nothing
    keep: bool = False
    ends_stage: Callable[[Progress], bool] = lambda progress: False
    check_first: Callable[[dict[str, float]], None] | None = None
    diagnoses: Callable[[Any], bool] = lambda batch: True
    make_step: Callable[[Phase], Step] | None = None
    programs: Callable[[Phase], list[Program]] = lambda phase: []

    def with_(self, **fields: Any) -> Phase:
        """Returns the same phase with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def tokens(self) -> int:
        """Tokens that all steps read from the phase's rows: prompts and stored answers.

        Answers that a model draws during the phase are not counted.
        """
        left, epoch, total = self.steps, 0, 0
        lengths = self.rows.lengths
        while left > 0:
            plan = self.plan(epoch)
            total += int(lengths[plan.examples(left)].sum())
            left -= len(plan)
            epoch += 1
        return total

    def step(self) -> Step:
        """Returns ``step(state, frozen, batch) -> (state, metrics)``, compiled when called."""
        return self.update() if self.make_step is None else self.make_step(self)

    def update(self) -> Step:
        """Returns a step that makes one update with the objective's gradient."""
        return make_train_step(
            self.spec,
            self.objective,
            self.optimizer,
            microbatches=self.microbatches,
            seed=self.seed,
        )

    def diagnosis(self) -> Callable[[TrainState, Tree, Any], Metrics] | None:
        """Returns what measures the gradient norms of the loss's terms; None for a single term."""
        if not self.objective.terms():
            return None
        return make_diagnosis(self.spec, self.objective, microbatches=self.microbatches)
