"""The trainer runs the phases of a stage: steps, logging, validation, stopping, checkpoints.

The loop depends only on (state, progress, data order). Restarted from a checkpoint, it takes the
same steps as an uninterrupted run.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from proxykd_jax.training.batches import placed_batches
from proxykd_jax.training.checkpoint import Checkpoints, Progress
from proxykd_jax.training.console import Console
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.state import (
    TrainState,
    Tree,
    abstract_state,
    init_state,
    with_fresh_optimizer,
)
from proxykd_jax.training.steps import Metrics

T = TypeVar("T", Model, TrainState)
# (model, rows, most) -> {"nll", "agreement"} on the first ``most`` rows.
Measure = Callable[[Model, Rows, int], dict[str, float]]


@dataclass(frozen=True)
class Periodic(Generic[T]):
    """Figures that are logged every ``every`` steps and after the last; they decide nothing.

    Attributes:
      every: number of steps of the stage between two measurements.
      figures: (model or state) -> figures by the names that they have in the log.
    """

    every: int
    figures: Callable[[T], dict[str, float]]


@dataclass
class Trainer:
    """What all phases of a stage share.

    Attributes:
      stage: ``align`` or ``distill``.
      state: the training state; each step changes it.
      progress: where the stage stands.
      checkpoints, log: where the state, the progress and the metrics are written.
      every: the stage's section of the config, which says how often.
      validate: ``(state) -> {"nll": ..., ...}`` on the validation rows; None without such rows.
      console: what a person sees.
      mesh: the mesh that a batch's rows are split over.
      periodic: further figures, or None.
    """

    stage: str
    state: TrainState
    progress: Progress
    checkpoints: Checkpoints
    log: MetricsLog
    every: TrainingSection
    validate: Callable[[TrainState], dict[str, float]] | None
    console: Console
    mesh: Mesh
    periodic: Periodic[TrainState] | None

    @classmethod
    def open(
        cls,
        stage: str,
        folder: Path,
        trainable: Tree,
        optimizer: optax.GradientTransformation,
        *,
        mesh: Mesh,
        log: MetricsLog,
        every: TrainingSection,
        validate: Callable[[TrainState], dict[str, float]] | None,
        periodic: Periodic[TrainState] | None = None,
    ) -> Trainer:
        """Returns a stage's trainer at its newest checkpoint in ``folder``, or at its beginning.

        Log lines of later steps are dropped, because the trainer writes them again.

        Args:
          stage, mesh, log, every, validate, periodic: see ``Trainer``.
          folder: folder of the checkpoints.
          trainable: what learns, before the first step.
          optimizer: optimizer of the first phase. Later phases have states of the same structure.
        """
        checkpoints = Checkpoints(folder)
        console = Console(stage)
        restored = checkpoints.restore_latest(abstract_state(trainable, optimizer, mesh))
        if restored is None:
            progress = Progress()
            state = _first_state(trainable, optimizer, mesh)
        else:
            state, progress = restored
            console.say(f"going on from step {progress.step}")
        log.resume(stage, progress.metric_lines)
        trainer = cls(
            stage, state, progress, checkpoints, log, every, validate, console, mesh, periodic
        )
        # A kill may have come after the last checkpoint and before the removal of older ones.
        trainer._prune()
        return trainer

    def run(
        self,
        phases: Sequence[Phase],
        *,
        untrained: str,
        before: Callable[[TrainState], Mapping[str, float]],
    ) -> None:
        """Runs the phases that are left; evaluates the untrained model first.

        Args:
          phases: the phases of the stage; the first one has number 1.
          untrained: name of phase 0, the evaluation before any step.
          before: further figures of phase 0; each phase may add its own.
        """
        self.console.begin(sum(phase.steps for phase in phases), self.progress.step)
        if self.progress.phase == 0:
            self.check_validation(untrained)
            self.look(untrained)
            figures = dict(before(self.state))
            for phase in phases:
                figures |= phase.before(self.state)
            self._finish_phase(untrained, figures, keep=True)
        for number, phase in enumerate(phases, start=1):
            if self.progress.phase == number:
                self._run_phase(phase, phases[number] if number < len(phases) else None)
            if phase.ends_stage(self.progress):
                return

    def trained_by(self, name: str, role: str, trainable: Tree) -> Tree:
        """Returns what a model had learnt at the end of a phase whose checkpoint was kept.

        Args:
          name: name of the phase.
          role, trainable: as in ``Checkpoints.restore_model``.
        """
        step = next(found["step"] for found in self.progress.results if found["phase"] == name)
        return self.checkpoints.restore_model(step, role, trainable)

    def finish(self, folder: Path, counts: Mapping[str, int]) -> None:
        """Marks the stage complete; records the checkpoints and what each phase reported."""
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
        """Saves a checkpoint and removes those that are no longer needed."""
        progress = self.progress
        progress.metric_lines = self.log.lines(self.stage)
        self.checkpoints.save(self.state, progress)
        self._prune()

    def _prune(self) -> None:
        best = self.progress.best_step
        self.checkpoints.prune({*self.progress.kept, *([] if best is None else [best])})

    def check_validation(self, phase: str) -> bool:
        """Validates and records the best; returns whether this is a new best of the stage."""
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
        """Logs the periodic figures of the current state."""
        if self.periodic is None:
            return
        started = time.perf_counter()
        figures = self.periodic.figures(self.state)
        seconds = time.perf_counter() - started
        step = self.progress.step
        self.log.write(self.stage, step, {**figures, "time/periodic_s": seconds}, phase=phase)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.console.say(f"{phase} step {step}: {shown}")

    def _finish_phase(self, phase: str, figures: Mapping[str, Any], *, keep: bool) -> None:
        """Ends a phase: writes its last log line and the checkpoint that the next one starts from.

        Times go to the log alone, because they measure this process: a resumed run has others.
        """
        progress = self.progress
        if figures:
            self.log.write(self.stage, progress.step, figures, phase=phase)
        kept = {name: value for name, value in figures.items() if not name.startswith("time/")}
        progress.results.append({"phase": phase, "step": progress.step, **kept})
        if keep:
            progress.kept.append(progress.step)
        progress.next_phase()
        self.save()

    def _stopped(self) -> bool:
        stop = self.every.stop
        return stop.enabled and self.progress.stale >= stop.patience

    def _run_phase(self, phase: Phase, following: Phase | None) -> None:
        """Takes the steps of a phase that are left, and ends the phase.

        Raises:
          UserError: the loss or a gradient is not finite; nothing of that step was saved.
          Stopped: the run was asked to stop; the last step was saved.
        """
        if phase.prepare is not None:
            phase = phase.prepare(phase, self)
        # If validation stopped the phase, the restored checkpoint may be the one at that stop.
        if phase.steps > 0 and not self._stopped():
            with saves_on_stop():
                self._take_steps(phase)
        if following is not None and following.optimizer is not phase.optimizer:
            self.state = with_fresh_optimizer(self.state, following.optimizer, self.mesh)
        self._finish_phase(phase.name, phase.after(self.state), keep=phase.keep)

    def _batches(self, phase: Phase) -> Iterator[Any]:
        """Yields the batches of the steps that are left."""
        start = self.progress.phase_step
        if phase.make_batch is None:
            assert phase.collate is not None
            yield from placed_batches(
                phase.plan, phase.collate, start=start, stop=phase.steps, mesh=self.mesh
            )
            return
        for step in range(start, phase.steps):
            yield phase.make_batch(self.state, phase.frozen, step)

    def _take_steps(self, phase: Phase) -> None:
        name, num_steps = phase.name, phase.steps
        step_fn, diagnose = phase.step(), phase.diagnosis()
        progress, every = self.progress, self.every
        # About the tokens of a step: its rows, as the corpus has them.
        tokens = float(np.mean(phase.rows.lengths)) * every.batch_size
        report = functools.partial(self._report, name, num_steps, tokens)
        seen: set[Any] = set()
        waiting: tuple[int, int, Metrics, float] | None = None
        started = time.perf_counter()
        for batch in self._batches(phase):
            shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
            if shapes not in seen:  # a new program will be compiled for these shapes
                seen.add(shapes)
                make_room()
            diagnosis = None
            due = progress.phase_step % every.diagnose_every == 0
            if diagnose is not None and due and phase.diagnoses(batch):
                diagnosis = diagnose(self.state, phase.frozen, batch)
                started += _blocked(diagnosis)
            self.state, metrics = step_fn(self.state, phase.frozen, batch)
            progress.phase_step += 1
            progress.step += 1
            if diagnosis is not None:
                metrics = {**metrics, **diagnosis}
            # Fetch the previous step's metrics while the device works on this step.
            report(waiting)
            now = time.perf_counter()
            waiting = (progress.step, progress.phase_step, metrics, now - started)
            started = now
            if progress.phase_step == 1 and phase.check_first is not None:
                phase.check_first({name: float(value) for name, value in metrics.items()})
            if phase.make_batch is not None:
                # Check the metrics now: a state that is not finite must not make a batch.
                report(waiting)
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
            report(waiting)
            waiting = None
            new_best = validates and self.check_validation(name)
            if looks or self._stopped():
                self.look(name)
            if saves or new_best or self._stopped():
                self.save()
            if stops:
                raise Stopped(STOPPED)
            if self._stopped():
                return
            started = time.perf_counter()
        report(waiting)
        # _finish_phase saves this step's checkpoint. Evaluating the same state twice would also
        # write a second log line.
        self.check_validation(name)
        self.look(name)

    def _report(
        self,
        phase: str,
        num_steps: int,
        tokens: float,
        waiting: tuple[int, int, Metrics, float] | None,
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
        self.console.step(phase, phase_step, num_steps, values, seconds=seconds, tokens=tokens)
        if step % self.every.log_every == 0:
            self.log.write(self.stage, step, {**values, "time/step_s": seconds}, phase=phase)


def _first_state(
    trainable: Tree, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns step 0 on the mesh; copies, because a step donates its state and the model keeps its
    own weights."""

    def make(trainable: Tree) -> TrainState:
        return init_state(jax.tree.map(jnp.copy, trainable), optimizer)

    shardings = tree_shardings(jax.eval_shape(make, trainable), mesh)
    return jax.jit(make, out_shardings=shardings)(trainable)


def _blocked(tree: Any) -> float:
    """Waits for arrays; returns the seconds, which are not part of a step."""
    started = time.perf_counter()
    jax.block_until_ready(tree)
    return time.perf_counter() - started
