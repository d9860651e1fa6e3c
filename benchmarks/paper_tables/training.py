"""The product's step on all seeds at once, with its validation and its choice of the best state."""

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

from benchmarks.paper_tables.vectorise import over_seeds, stack
from proxykd_jax.config import TrainingSection
from proxykd_jax.evaluation.measures import position_measures
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.batch_objectives import Objective
from proxykd_jax.training.batches import make_plan
from proxykd_jax.training.state import ModelSpec, Spec, TrainState, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import TokenBatch

# (constants, params, one step's data, step) -> batch of the objective
MakeBatch = Callable[[Any, Any, Any, jax.Array], Any]


def as_it_is(constants: Any, params: Any, batch: Any, step: jax.Array) -> Any:
    """The batch of methods that need nothing of the model in training."""
    return batch


@functools.lru_cache(maxsize=64)
def _steps(
    spec: Spec,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    make_batch: MakeBatch,
    updates: int,
) -> Callable[..., Any]:
    """``(constants, state, data_Z) -> (state, losses_Z)``: as many steps as there are batches."""
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
def _validation(spec: ModelSpec) -> Callable[..., Any]:
    def nll(params: Any, batch: TokenBatch) -> jax.Array:
        figures = position_measures(spec.config, params, None, batch)
        return jnp.where(batch.mask_BL, figures["nll"], 0.0).sum() / batch.mask_BL.sum()

    return over_seeds(nll)


def _take_better(better: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)


_better = over_seeds(_take_better)


@dataclass
class Run:
    """A stage of all seeds: what ``training.loop.Trainer`` is to one.

    Attributes:
      spec, optimizer: of the stage.
      state: of the last step, with a leading axis of seeds.
      validation: held-out rows, with that axis.
      best, best_nll: parameters with the lowest validation NLL so far, and it.
      snapshots: step -> parameters, where asked for.
      seconds_a_step: of all seeds together, validation and compilation left out.
      has_beside: the trainable part is a dictionary, of which ``student`` is the model.
    """

    spec: ModelSpec
    optimizer: optax.GradientTransformation
    state: TrainState
    validation: TokenBatch
    best: Any
    best_nll: np.ndarray
    snapshots: dict[int, Any] = field(default_factory=dict)
    seconds_a_step: float = float("nan")
    has_beside: bool = False

    @staticmethod
    def start(
        spec: ModelSpec,
        optimizer: optax.GradientTransformation,
        params_S: Any,
        validation: TokenBatch,
        beside: dict[str, Any] | None = None,
    ) -> Run:
        """Step 0, whose parameters are the best so far.

        Args:
          spec, optimizer, params_S, validation: see the attributes.
          beside: what else learns, by name, as the optimizer knows it.
        """
        trainable = params_S if beside is None else {"student": params_S, **beside}
        state = jax.vmap(lambda tree: init_state(tree, optimizer))(trainable)
        nll_S = np.asarray(_validation(spec)(params_S, validation))
        has_beside = beside is not None
        return Run(spec, optimizer, state, validation, params_S, nll_S, has_beside=has_beside)

    @property
    def last(self) -> Any:
        """Parameters after the last step."""
        return self.state.trainable["student"] if self.has_beside else self.state.trainable

    def renew_optimizer(self) -> None:
        """The next phase begins with an optimizer of its own."""
        fresh = jax.vmap(self.optimizer.init)(self.state.trainable)
        self.state = dataclasses.replace(self.state, opt_state=fresh)

    def copy(self) -> Run:
        """Another run from here on; arrays are never changed in place."""
        return dataclasses.replace(self, snapshots={})

    def train(
        self,
        objective: Objective,
        batches: Callable[[int, int], Any],
        num_steps: int,
        *,
        every: int,
        make_batch: MakeBatch = as_it_is,
        constants: Any = None,
        snapshot_every: int | None = None,
        step_spec: Spec | None = None,
        updates: int = 1,
    ) -> None:
        """Takes the steps of a phase; validates every so many and at the end.

        Args:
          objective: the product's.
          batches: (start, stop) -> data of these steps of the phase, ``[S, stop - start, ...]``.
          num_steps: of the phase.
          every: steps between validations.
          make_batch: makes the objective's batch of a step's data.
          constants: what it needs beside, with a leading axis of seeds; ``frozen`` is the step's.
          snapshot_every: keeps the parameters every so many steps.
          step_spec: of all the models that the objective reads, where there are several.
          updates: that one step's data are for; ``make_batch`` then gives as many batches.
        """
        chunk = math.gcd(every, num_steps, snapshot_every or num_steps)
        step = _steps(step_spec or self.spec, objective, self.optimizer, make_batch, updates)
        if constants is None:
            constants = {}
        seconds = []
        for done in range(chunk, num_steps + 1, chunk):
            data = batches(done - chunk, done)
            started = time.perf_counter()
            self.state, losses = step(constants, self.state, data)
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
        nll_S = np.asarray(_validation(self.spec)(self.last, self.validation))
        better_S = nll_S < self.best_nll
        self.best = _better(better_S, self.last, self.best)
        self.best_nll = np.where(better_S, nll_S, self.best_nll)


def plan_rows(
    count: int, section: TrainingSection, seed: int, phase: str, num_steps: int
) -> np.ndarray:
    """int ``[Z, B]``: the rows of every step in the product's order; -1 is padding.

    Args:
      count: rows of the split.
      section: of the config: batch size and batching.
      seed, phase: as the product keys its orders.
      num_steps: Z.
    """
    if count == 0:
        raise ValueError(f"{phase}: no rows to learn from.")
    # Of one length: rows that are padded to it are planned alike whatever their own is.
    plan = make_plan(
        np.ones(count, np.int64),
        seed=purpose_seed(seed, phase),
        batch_size=section.batch_size,
        batching=section.batching,
        max_length=8,
    )
    steps: list[np.ndarray] = []
    epoch = 0
    while len(steps) < num_steps:
        for planned in plan(epoch):
            steps.append(np.array([row[0] if row else -1 for row in planned.rows]))
        epoch += 1
    return np.stack(steps[:num_steps])


def planned(pools: Sequence[Any], plans: Sequence[np.ndarray]) -> Callable[[int, int], Any]:
    """``batches`` for ``Run.train``: rows of each seed's pool, whose last row is padding."""

    def batches(start: int, stop: int) -> Any:
        return stack(
            [
                jax.tree.map(lambda x, at=plan[start:stop]: np.asarray(x)[at], pool)
                for pool, plan in zip(pools, plans, strict=True)
            ]
        )

    return batches


def stacked_rows(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Batches of all seeds, filled up with their last row, which is padding."""
    most = max(batch.tokens_BL.shape[0] for batch in batches)

    def filled(batch: TokenBatch) -> TokenBatch:
        places = np.minimum(np.arange(most), batch.tokens_BL.shape[0] - 1)
        return jax.tree.map(lambda x: x[places], batch)

    return stack([filled(batch) for batch in batches])
