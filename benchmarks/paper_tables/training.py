"""Takes the product's phases for all seeds at once, validates, and keeps the best state."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.vectorise import over_seeds, stack
from proxykd_jax.config import TrainingSection
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.evaluation.measures import position_measures
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.training.batch_objectives import Objective
from proxykd_jax.training.batches import planned_steps
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.state import Spec, TrainState, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import TokenBatch

# (constants, what learns, the data of a step, step) -> the batch of the objective
MakeBatch = Callable[[Any, Any, Any, jax.Array], Any]


def as_it_is(constants: Any, trainable: Any, batch: Any, step: jax.Array) -> Any:
    """The batch of a step that needs nothing of the model in training."""
    return batch


def every_row(count: int) -> PlannedBatch:
    """A batch of so many rows, with a row of padding at the end."""
    return PlannedBatch((*((row,) for row in range(count)), ()), s.ROW_LENGTH - 1)


def order_of(phase: Phase, steps: int | None = None) -> np.ndarray:
    """int ``[Z, B]``, the rows of each step of a phase; -1 stands for padding.

    Raises:
      ValueError: the phase has no rows.
    """
    if len(phase.rows) == 0:
        raise ValueError(f"{phase.name}: no rows to learn from.")
    planned = planned_steps(phase.plan)
    batches = [planned(step).rows for step in range(phase.steps if steps is None else steps)]
    return np.array([[row[0] if row else -1 for row in rows] for rows in batches])


@functools.lru_cache(maxsize=64)
def _steps(
    spec: Spec,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    make_batch: MakeBatch,
    updates: int,
) -> Callable[..., Any]:
    """``(constants, state, data_Z) -> (state, losses_Z)`` for as many steps as there are data."""
    step = make_train_step(spec, objective, optimizer, microbatches=1, seed=0)

    def run(constants: Any, state: TrainState, data_Z: Any) -> tuple[TrainState, jax.Array]:
        def one(state: TrainState, data: Any) -> tuple[TrainState, jax.Array]:
            batch = make_batch(constants, state.trainable, data, state.step)
            return update(state, batch) if updates == 1 else jax.lax.scan(update, state, batch)

        def update(state: TrainState, batch: Any) -> tuple[TrainState, jax.Array]:
            state, metrics = step(state, constants.get("frozen", {}), batch)
            return state, metrics["loss"]

        return jax.lax.scan(one, state, data_Z)

    return over_seeds(run)


@functools.lru_cache(maxsize=8)
def _validation(config: ModelConfig) -> Callable[..., Any]:
    def nll(params: Any, batch: TokenBatch) -> jax.Array:
        figures = position_measures(config, params, None, batch)
        return jnp.where(batch.mask_BL, figures["nll"], 0.0).sum() / batch.mask_BL.sum()

    return over_seeds(nll)


def _take_better(better: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)


_better = over_seeds(_take_better)


@dataclass
class Run:
    """A stage of all seeds, as ``training.loop.Trainer`` is a stage of one.

    Attributes:
      spec: the static half of what learns.
      optimizer: the optimizer of all phases.
      every: the number of steps between validations.
      state: the state after the last step, with a leading axis of seeds.
      validation: held-out rows, with that axis.
      best, best_nll: the parameters with the lowest validation NLL so far, and that NLL.
      snapshots: parameters by step, where they are asked for.
      seconds_a_step: of all seeds together, without validation and compilation.
    """

    spec: Spec
    optimizer: optax.GradientTransformation
    every: int
    state: TrainState
    validation: TokenBatch
    best: Any
    best_nll: np.ndarray
    snapshots: dict[int, Any] = field(default_factory=dict)
    seconds_a_step: float = float("nan")

    @staticmethod
    def start(
        phase: Phase,
        section: TrainingSection,
        trainable_S: Any,
        validation: TokenBatch,
        optimizer: optax.GradientTransformation | None = None,
    ) -> Run:
        """The run at step 0, whose parameters are the best so far.

        Args:
          phase: the first phase of a seed.
          section: the stage's section of the config.
          trainable_S: what learns.
          validation: held-out rows.
          optimizer: of the phases (default: the section's).
        """
        optimizer = optimizer or s.optimizer_of(section.optimizer)
        state = jax.vmap(lambda tree: init_state(tree, optimizer))(trainable_S)
        params_S = phase.spec.learner(trainable_S)
        nll_S = np.asarray(_validation(phase.spec.config)(params_S, validation))
        return Run(phase.spec, optimizer, section.stop.every, state, validation, params_S, nll_S)

    @property
    def last(self) -> Any:
        """The parameters after the last step."""
        return self.spec.learner(self.state.trainable)

    def renew_optimizer(self) -> None:
        """Lets the next phase begin with a fresh state of the optimizer."""
        fresh = jax.vmap(self.optimizer.init)(self.state.trainable)
        self.state = dataclasses.replace(self.state, opt_state=fresh)

    def copy(self) -> Run:
        """A second run that goes on from here. Arrays are never changed in place."""
        return dataclasses.replace(self, snapshots={})

    def take(
        self,
        phases: Sequence[Phase],
        *,
        pools: Sequence[Any] | None = None,
        orders: Sequence[np.ndarray] | None = None,
        beside: Sequence[np.ndarray] = (),
        make_batch: MakeBatch = as_it_is,
        constants: Any = None,
        updates: int = 1,
        snapshot_every: int | None = None,
    ) -> None:
        """Takes the steps of a phase; validates every so many steps and at the end.

        Args:
          phases: the phase of each seed. Their spec and objective are the same.
          pools: all rows of each seed as arrays, padding last (default: what the phase collates).
          orders: the rows of each seed's steps (default: the phase's).
          beside: further data of each step, ``[S, Z, ...]``.
          make_batch: makes the objective's batch from a step's data.
          constants: a tree with a leading axis of seeds for ``make_batch``; its entry ``frozen``
            holds the frozen weights of the step.
          updates: the number of updates on a step's data; ``make_batch`` then returns as many
            batches.
          snapshot_every: the number of steps after which parameters are kept.
        """
        if pools is None:
            collates = [phase.collate for phase in phases]
            assert all(collates)
            pools = [f(every_row(len(p.rows))) for f, p in zip(collates, phases, strict=True) if f]
        orders = orders or [order_of(phase) for phase in phases]
        num_steps, every = len(orders[0]), max(self.every // updates, 1)
        chunk = math.gcd(every, num_steps, snapshot_every or num_steps)
        shared = (phases[0].spec, phases[0].objective, self.optimizer)
        steps = _steps(*shared, make_batch, updates)
        seconds = []
        for done in range(chunk, num_steps + 1, chunk):
            part = slice(done - chunk, done)
            rows = stack(
                [_at(pool, order[part]) for pool, order in zip(pools, orders, strict=True)]
            )
            data = (rows, *(x[:, part] for x in beside)) if beside else rows
            started = time.perf_counter()
            self.state, losses = steps(constants or {}, self.state, data)
            finite = np.isfinite(np.asarray(losses)).all()
            seconds.append(time.perf_counter() - started)
            if not finite:
                raise FloatingPointError(f"the loss of a seed is not finite before step {done}")
            if done % every == 0 or done == num_steps:
                self._validate()
            if snapshot_every is not None and done % snapshot_every == 0:
                self.snapshots[done] = self.last
        self.seconds_a_step = float(np.median(seconds)) / (chunk * updates)

    def _validate(self) -> None:
        nll_S = np.asarray(_validation(self.spec.config)(self.last, self.validation))
        better_S = nll_S < self.best_nll
        self.best = _better(better_S, self.last, self.best)
        self.best_nll = np.where(better_S, nll_S, self.best_nll)


def _at(pool: Any, rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: np.asarray(x)[rows], pool)
