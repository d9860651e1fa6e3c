"""The contents of a checkpoint, and Orbax checkpoints that are known to be complete and undamaged.

A checkpoint holds a ``TrainState`` (the step, what learns, the optimizer's state) and a
``Progress`` (where the stage stands), and nothing else. Frozen weights are read from their folder
again. The order of the data and the random keys are functions of the seed and the step.

Orbax detects neither a flipped bit nor a missing commit marker: in a test it restored 19 of 19
flipped bits without an error. Each checkpoint therefore has a file of digests, written after the
commit. A checkpoint without this file is unfinished and is ignored.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from proxykd_jax.artifacts import (
    changed_files,
    digest_files,
    read_json,
    remove_leftovers,
    write_json,
)
from proxykd_jax.errors import UserError
from proxykd_jax.peers import is_first, on_first, say
from proxykd_jax.training.state import TrainState, Tree


@dataclass
class Progress:
    """Where a stage stands; every checkpoint stores it with the state.

    Attributes:
      phase: index of the phase of the next step.
      phase_step: steps taken in this phase.
      step: steps taken in the stage.
      best_nll: lowest validation NLL of the stage so far, nats per token.
      best_step: the step of ``best_nll``; its checkpoint is kept.
      phase_best_nll: lowest validation NLL of this phase.
      stale: validations since ``phase_best_nll``.
      metric_lines: lines of metrics.jsonl that belong to the steps taken.
      kept: steps whose checkpoints are never removed (ends of rounds).
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
        """Starts the next phase."""
        self.phase += 1
        self.phase_step = 0
        self.phase_best_nll = None
        self.stale = 0


class Checkpoint(NamedTuple):
    """The contents of a checkpoint."""

    state: TrainState
    progress: Progress


class DamagedError(UserError):
    """A checkpoint's files differ from what was written."""


class Checkpoints:
    """The checkpoints of one stage: ``<folder>/checkpoints/<step>`` and ``<folder>/digests``."""

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        logging.getLogger("absl").setLevel(logging.ERROR)
        self._ocp = ocp
        self._folder = folder.resolve() / "checkpoints"
        self._digests = folder.resolve() / "digests"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                create=True, cleanup_tmp_directories=True, enable_async_checkpointing=False
            ),
            item_names=("state", "progress"),
        )

    def steps(self) -> list[int]:
        """Returns the steps of the finished checkpoints, oldest first."""
        saved = set(self._manager.all_steps())
        named = on_first(lambda: [int(path.stem) for path in self._digests.glob("*.json")])
        return sorted(saved & set(named))

    def save(self, state: TrainState, progress: Progress) -> None:
        """Saves the checkpoint of ``progress.step``; returns when it is on disk with its digests.

        Raises:
          RuntimeError: it could not be written, for example because the disk is full.
        """
        args, step = self._ocp.args, progress.step
        if step in self._manager.all_steps():
            self._remove(step)  # a killed process left it without digests, or it is saved again
        composite = args.Composite(
            state=args.StandardSave(state), progress=args.JsonSave(asdict(progress))
        )
        try:
            saved = self._manager.save(step, args=composite, force=True)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {error}"
            ) from error
        if not saved:
            raise RuntimeError(f"Orbax did not write step {step} to {self._folder}")

        def write_digests() -> None:
            write_json(self._digests / f"{step}.json", digest_files(self._folder / str(step)))

        on_first(write_digests)

    def restore(self, step: int, abstract_state: TrainState) -> Checkpoint:
        """Restores a checkpoint; ``abstract_state`` gives the shardings of its state.

        Raises:
          UserError: the files were changed (``DamagedError``) or hold another model.
        """
        args = self._ocp.args
        wanted = args.Composite(
            state=args.StandardRestore(abstract_state), progress=args.JsonRestore()
        )
        with self._reading(step):
            found = self._manager.restore(step, args=wanted)
        return Checkpoint(found["state"], Progress(**found["progress"]))

    def restore_model(self, step: int, role: str, trainable: Tree) -> Tree:
        """Restores what a model had learnt at a step, without the optimizer's state.

        Args:
          step: step of the checkpoint.
          role: ``proxy`` or ``student``; it selects the part to read if several models learnt.
          trainable: shapes and shardings of what the model learns.

        Raises:
          UserError: as in ``restore``.
        """
        ocp, folder = self._ocp, self._folder / str(step) / "state"
        with self._reading(step), ocp.PyTreeCheckpointer() as reader:
            saved = reader.metadata(folder).item_metadata.tree["trainable"]
            several = role in saved
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                {"trainable": {role: trainable} if several else trainable},
            )
            wanted = ocp.args.PyTreeRestore(
                item=shapes,
                restore_args=ocp.checkpoint_utils.construct_restore_args(shapes),
                partial_restore=True,
            )
            found = reader.restore(folder, args=wanted)["trainable"]
        return found[role] if several else found

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Verifies a checkpoint first, and turns an error inside the block into a ``UserError``."""
        self.verify(step)
        try:
            yield
        except Exception as error:  # Orbax raises bare exceptions with pages of detail
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be restored: {reason}"
            ) from error

    def verify(self, step: int) -> None:
        """Raises ``DamagedError`` if a file differs from what was written."""

        def find_problems() -> list[str]:
            digests = read_json(self._digests / f"{step}.json")
            return changed_files(self._folder / str(step), digests)

        problems = on_first(find_problems)
        if problems:
            raise DamagedError(f"the checkpoint of step {step} is damaged: {'; '.join(problems)}.")

    def restore_latest(self, abstract_state: TrainState) -> Checkpoint | None:
        """Returns the newest undamaged checkpoint, or None; warns about each one that it skips.

        It also removes half-written and half-removed checkpoints of killed processes.
        """
        for step in sorted(set(self._manager.all_steps()) - set(self.steps())):
            self._remove(step)
        remove_leftovers(self._digests)
        for step in reversed(self.steps()):
            try:
                return self.restore(step, abstract_state)
            except DamagedError as error:
                say(f"WARNING: {error} Falling back to an earlier one.")
                self._remove(step)
        return None

    def prune(self, keep: set[int]) -> None:
        """Removes all checkpoints except those of ``keep`` and the newest two."""
        steps = self.steps()
        for step in steps[:-2]:
            if step not in keep:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # The digests go first, because a checkpoint without them is ignored.
        if is_first():
            (self._digests / f"{step}.json").unlink(missing_ok=True)
        self._manager.delete(step)
        leftover = self._folder / str(step)
        if is_first() and leftover.exists():
            shutil.rmtree(leftover)

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()
