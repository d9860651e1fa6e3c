"""One phase of training: steps, logging, validation, stopping, checkpoints.

A phase is a warm-up, a round, or a student's whole training. The loop is a pure consequence of
(state, progress, data order): started again from a checkpoint it does what it would have done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from proxykd_jax.artifacts import complete_stage
from proxykd_jax.config import TrainingSection
from proxykd_jax.data.collate import Rows
from proxykd_jax.errors import Stopped, UserError
from proxykd_jax.models.fingerprint import params_fingerprint
from proxykd_jax.parallel.mappings import make_room
from proxykd_jax.parallel.sharding import tree_shardings
from proxykd_jax.peers import STOPPED, saves_on_stop, stop_wanted
from proxykd_jax.training.checkpoint import Checkpoints
from proxykd_jax.training.console import Console
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import TrainState, Tree, abstract_state, init_state
from proxykd_jax.training.steps import Metrics, Step

T = TypeVar("T", Model, TrainState)
# (model, rows, most) -> {"nll", "agreement"} on the first ``most`` rows.
Measure = Callable[[Model, Rows, int], dict[str, float]]


@dataclass(frozen=True)
class Periodic(Generic[T]):
    """Figures that are logged every so many steps and after the last; they decide nothing.

    Attributes:
      every: steps of the stage.
      figures: of a model or a state, by the names that the log has them under.
    """

    every: int
    figures: Callable[[T], dict[str, float]]


@dataclass
class Progress:
    """Where a stage stands; saved beside the state in every checkpoint.

    Attributes:
      phase: index of the phase that the next step belongs to.
      phase_step: steps taken in it.
      step: steps taken in the stage.
      best_nll: lowest validation NLL so far, nats a token.
      best_step: the step that had it; its checkpoint is kept.
      phase_best_nll, stale: the lowest in this phase, and validations since then.
      metric_lines: lines of metrics.jsonl that belong to the steps taken.
      kept: steps whose checkpoints are kept for good (ends of rounds).
      results: what each finished phase reported.
    """

    phase: int = 0
    phase_step: int = 0
    step: int = 0
    best_nll: float | None = None
    best_step: int | None = None
    phase_best_nll: float | None = None
    stale: int = 0
    metric_lines: int = 0
    kept: list[int] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    def next_phase(self) -> None:
        """The current phase is over."""
        self.phase += 1
        self.phase_step = 0
        self.phase_best_nll = None
        self.stale = 0


@dataclass
class Trainer:
    """What all phases of a stage share.

    Attributes:
      stage: ``align`` or ``distill``.
      state: changes with each step.
      frozen: weights that do not.
      progress: where the stage stands.
      checkpoints, log: where it is written.
      every: how often.
      validate: ``(state) -> {"nll": ..., ...}`` on the validation rows; None without such rows.
      console: what a person sees.
      periodic: further figures; None for none.
    """

    stage: str
    state: TrainState
    frozen: Tree
    progress: Progress
    checkpoints: Checkpoints
    log: MetricsLog
    every: TrainingSection
    validate: Callable[[TrainState], dict[str, float]] | None
    console: Console
    periodic: Periodic[TrainState] | None

    @classmethod
    def open(
        cls,
        stage: str,
        folder: Path,
        model: Model,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh,
        log: MetricsLog,
        every: TrainingSection,
        validate: Callable[[TrainState], dict[str, float]] | None,
        periodic: Periodic[TrainState] | None = None,
    ) -> Trainer:
        """A stage's trainer, at its newest checkpoint in ``folder`` or at its beginning.

        Lines that the log holds of later steps are dropped: they will be written again.
        """
        checkpoints = Checkpoints(folder)
        console = Console(stage)
        restored = checkpoints.restore_latest(abstract_state(model.trainable, optimizer, mesh))
        if restored is None:
            progress = Progress()
            state = _first_state(model.trainable, optimizer, mesh)
        else:
            state, progress = restored[0], Progress(**restored[1])
            console.say(f"going on from step {progress.step}")
        log.resume(stage, progress.metric_lines)
        trainer = cls(
            stage,
            state,
            model.frozen,
            progress,
            checkpoints,
            log,
            every,
            validate,
            console,
            periodic,
        )
        # A kill may have come between the last checkpoint and the removal of those it replaced.
        trainer._prune()
        return trainer

    def finish(self, folder: Path, counts: Mapping[str, int]) -> None:
        """Marks the stage complete: which checkpoints count, what each phase reported."""
        self.checkpoints.close()
        self.console.close()
        progress = self.progress
        complete_stage(
            folder,
            counts={"steps": progress.step, **counts},
            files=[],  # each checkpoint has its own digests
            content=params_fingerprint(self.state.trainable),
            best_step=progress.best_step,
            best_nll=progress.best_nll,
            last_step=progress.step,
            kept_steps=progress.kept,
            results=progress.results,
        )

    def save(self) -> None:
        """A checkpoint of this moment, and removal of those that are no longer needed."""
        progress = self.progress
        progress.metric_lines = self.log.lines(self.stage)
        self.checkpoints.save(progress.step, self.state, asdict(progress))
        self._prune()

    def _prune(self) -> None:
        best = self.progress.best_step
        self.checkpoints.prune({*self.progress.kept, *([] if best is None else [best])})

    def check_validation(self, phase: str) -> bool:
        """Validates and notes the best; returns whether this is a new best of the stage."""
        if self.validate is None:
            return False
        progress, stop = self.progress, self.every.stop
        figures = self.validate(self.state)
        self.log.write(
            self.stage,
            progress.step,
            {f"validation/{name}": value for name, value in figures.items()},
            phase=phase,
        )
        self.console.say(
            f"{phase} step {progress.step}: "
            + ", ".join(f"validation {name} {value:.4f}" for name, value in figures.items())
        )
        nll = figures["nll"]
        improved = progress.phase_best_nll is None or nll < progress.phase_best_nll - stop.min_delta
        progress.stale = 0 if improved else progress.stale + 1
        if improved:
            progress.phase_best_nll = nll
        new_best = progress.best_nll is None or nll < progress.best_nll
        if new_best:
            progress.best_nll, progress.best_step = nll, progress.step
        return new_best

    def look(self, phase: str) -> None:
        """Logs the periodic figures of this moment."""
        if self.periodic is None:
            return
        started = time.perf_counter()
        figures = self.periodic.figures(self.state)
        seconds = time.perf_counter() - started
        step = self.progress.step
        self.log.write(self.stage, step, {**figures, "time/periodic_s": seconds}, phase=phase)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.say(f"{phase} step {step}: {shown}")

    def finish_phase(
        self,
        phase: str,
        figures: dict[str, Any],
        *,
        keep: bool,
        times: Mapping[str, float] | None = None,
    ) -> None:
        """Ends a phase: its last line in the log, and the checkpoint that the next one starts from.

        Args:
          phase: its name.
          figures: what it reports.
          keep: whether its checkpoint stays for good.
          times: ``time/...`` of this process's work, for the log alone: a resumed run has others.
        """
        progress = self.progress
        if figures:
            self.log.write(self.stage, progress.step, {**figures, **(times or {})}, phase=phase)
        progress.results.append({"phase": phase, "step": progress.step, **figures})
        if keep:
            progress.kept.append(progress.step)
        progress.next_phase()
        self.save()

    def _stopped(self) -> bool:
        stop = self.every.stop
        return stop.enabled and self.progress.stale >= stop.patience

    def run_phase(
        self,
        phase: str,
        step_fn: Step,
        batches: Iterable[Any],
        num_steps: int,
        *,
        diagnose: Callable[[TrainState, Tree, Any], Metrics] | None = None,
        check_first: Callable[[dict[str, float]], None] | None = None,
        from_state: bool = False,
    ) -> None:
        """Takes the steps of a phase that are still to be taken; ``finish_phase`` must follow.

        Args:
          phase: its name in the log.
          step_fn: from ``make_train_step``.
          batches: what ``step_fn`` takes, from step ``progress.phase_step`` of the phase on.
          num_steps: of the whole phase.
          diagnose: from ``make_diagnosis``.
          check_first: sees the metrics of the phase's first step, and raises if they are wrong.
          from_state: each batch is made from ``state`` when it is asked for; a step's metrics are
            then looked at before the next, so that a state that is not finite makes none.

        Raises:
          UserError: the loss or a gradient is not finite; nothing of that step was saved.
          Stopped: the run was asked to stop; the step just taken was saved.
        """
        if self._stopped():
            return  # at the very checkpoint that was restored
        with saves_on_stop():
            self._take_steps(phase, step_fn, batches, num_steps, diagnose, check_first, from_state)

    def _take_steps(
        self,
        phase: str,
        step_fn: Step,
        batches: Iterable[Any],
        num_steps: int,
        diagnose: Callable[[TrainState, Tree, Any], Metrics] | None,
        check_first: Callable[[dict[str, float]], None] | None,
        from_state: bool,
    ) -> None:
        progress, every = self.progress, self.every
        seen: set[Any] = set()
        waiting: tuple[int, int, Metrics, float] | None = None
        started = time.perf_counter()
        for batch in batches:
            if progress.phase_step >= num_steps:
                break
            shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
            if shapes not in seen:  # a program is compiled for them
                seen.add(shapes)
                make_room()
            diagnosis = None
            if diagnose is not None and progress.phase_step % every.diagnose_every == 0:
                diagnosis = diagnose(self.state, self.frozen, batch)
                started += _blocked(diagnosis)
            self.state, metrics = step_fn(self.state, self.frozen, batch)
            progress.phase_step += 1
            progress.step += 1
            if diagnosis is not None:
                metrics = {**metrics, **diagnosis}
            # The metrics of the step before are fetched while the device works on this one.
            self._report(phase, num_steps, waiting)
            now = time.perf_counter()
            waiting = (progress.step, progress.phase_step, metrics, now - started)
            started = now
            if progress.phase_step == 1 and check_first is not None:
                check_first({name: float(value) for name, value in metrics.items()})
            if from_state:
                self._report(phase, num_steps, waiting)
                waiting = None
            at_end = progress.phase_step == num_steps
            validates = (
                self.validate is not None
                and every.stop.enabled
                and progress.phase_step % every.stop.every == 0
            )
            looks = self.periodic is not None and progress.step % self.periodic.every == 0
            stops = stop_wanted()
            saves = stops or progress.phase_step % every.checkpoint_every == 0
            if at_end or not (validates or looks or saves):
                continue
            self._report(phase, num_steps, waiting)
            waiting = None
            new_best = validates and self.check_validation(phase)
            if looks or self._stopped():
                self.look(phase)
            if saves or new_best or self._stopped():
                self.save()
            if stops:
                raise Stopped(STOPPED)
            if self._stopped():
                return
            started = time.perf_counter()
        self._report(phase, num_steps, waiting)
        # Not saved here: the checkpoint of finish_phase is this step's, and a second look at the
        # same state would leave a second line.
        self.check_validation(phase)
        self.look(phase)

    def _report(
        self, phase: str, num_steps: int, waiting: tuple[int, int, Metrics, float] | None
    ) -> None:
        if waiting is None:
            return
        step, phase_step, metrics, seconds = waiting
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                good = self.checkpoints.steps()
                last = f"step {good[-1]}" if good else "none"
                raise UserError(
                    f"{self.stage}, {phase}, step {step}: {name} is {values[name]}. "
                    f"Last good checkpoint: {last}. Lower the learning rate or set clip_norm, "
                    "remove the stage's folder and start again."
                )
        self.console.step(phase, phase_step, num_steps, values)
        if step % self.every.log_every == 0:
            self.log.write(self.stage, step, {**values, "time/step_s": seconds}, phase=phase)


def _first_state(
    trainable: Tree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Step 0 on the mesh. A copy, because steps donate the state and the model keeps its own."""

    def make(trainable: Tree) -> TrainState:
        return init_state(jax.tree.map(jnp.copy, trainable), optimizer)

    shardings = tree_shardings(jax.eval_shape(make, trainable), mesh)
    return jax.jit(make, out_shardings=shardings)(trainable)


def _blocked(tree: Any) -> float:
    """Waits for arrays; returns the seconds it took, which are no part of a step."""
    started = time.perf_counter()
    jax.block_until_ready(tree)
    return time.perf_counter() - started
