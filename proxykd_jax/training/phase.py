"""A phase: what is trained between two checkpoints, as one value.

A warm-up, a round of alignment, a student's training: a stage is a list of them. The trainer runs a
phase (``training.loop``), ``--dry-run`` counts it, ``plan`` compiles it, and a checkpoint numbers
it by its place in the list.
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
      name: in the log and in the manifest.
      spec: the static half of the models that a step reads.
      objective: what a step minimises.
      optimizer: a phase with the very optimizer of the phase before goes on with its state; with
        another one it begins anew.
      rows: that are learnt from, or whose prompts are answered.
      plan: the batches of their epochs.
      steps: that are taken where nothing stops earlier; 0 for a phase that is left out.
      microbatches: parts that a batch is computed in.
      seed: of the run.
      frozen: weights that do not learn, as ``spec.bind`` takes them.
      trainable: what learns, before the first step of the stage's first phase.
      collate: a planned batch to the arrays of a step, for batches that are on disk.
      make_batch: ``(state, frozen, step) -> batch`` on the devices, for batches that are made from
        the state that they train. One of ``collate`` and ``make_batch`` is None.
      prepare: fills in what must be read or computed before the phase's next step. It is called
        once a process, with the trainer at the phase's first step or where it goes on.
      before: figures that stand before the stage's first step, of the untrained state.
      after: figures of the state that the phase ends with; ``time/...`` stands in the log alone.
      keep: whether the checkpoint at its end stays for good.
      ends_stage: whether no other phase follows, now that this one is over.
      check_first: sees the metrics of the phase's first step, and raises if they are wrong.
      diagnoses: whether the gradient norms of the loss's terms are taken on a batch.
      make_step: makes a step of several updates, in place of one update.
      programs: the programs that the phase starts, for ``plan``; of a sketch alone.
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
        """The same phase with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def tokens(self) -> int:
        """Tokens that all its steps read from its rows: prompts and stored answers.

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
        """``step(state, frozen, batch) -> (state, metrics)``, compiled where it is called."""
        return self.update() if self.make_step is None else self.make_step(self)

    def update(self) -> Step:
        """One update by the objective's gradient, as ``step`` is called."""
        return make_train_step(
            self.spec,
            self.objective,
            self.optimizer,
            microbatches=self.microbatches,
            seed=self.seed,
        )

    def diagnosis(self) -> Callable[[TrainState, Tree, Any], Metrics] | None:
        """The gradient norms of the loss's terms; None where it has one term."""
        if not self.objective.terms():
            return None
        return make_diagnosis(self.spec, self.objective, microbatches=self.microbatches)
