"""Loads finished proxies and students: selects a checkpoint and restores its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from proxykd_jax.artifacts import read_manifest, stage_identity
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.errors import UserError
from proxykd_jax.training.checkpoint import Checkpoints, DamagedError
from proxykd_jax.training.model import Model, load_for_training

Which = Literal["best", "last"]


def finished_step(folder: Path, which: Which) -> int | None:
    """Returns the step of the ``best`` or ``last`` state of a stage; None if nothing was trained;
    raises UserError if the stage is not complete."""
    manifest = read_manifest(folder)
    if manifest.get("status") != "complete":
        raise UserError(f"{folder} is not complete; run its stage again, which continues it.")
    best, last = manifest["best_step"], manifest["last_step"]
    return best if which == "best" and best is not None else last


def load_finished(
    section: ModelSection,
    folder: Path,
    *,
    role: str,
    seed: int,
    mesh: Mesh,
    which: Which | int,
) -> Model:
    """Returns the model of a finished stage.

    Args:
      section: section of the config that names its frozen weights.
      folder: folder of the stage.
      role, seed, mesh: as in ``load_for_training``.
      which: ``best``, ``last``, or the step of a checkpoint that was kept.

    Raises:
      UserError: the stage is not finished, or the checkpoint is missing or damaged.
    """
    model = load_for_training(section, role=role, seed=seed, mesh=mesh)
    step = which if isinstance(which, int) else finished_step(folder, which)
    if step is None:
        return model
    checkpoints = Checkpoints(folder)
    if step not in checkpoints.steps():
        there = ", ".join(map(str, checkpoints.steps())) or "none"
        raise UserError(
            f"{folder} keeps no checkpoint of step {step} (there: {there}). {_way_back(folder)}"
        )
    try:
        learnt = checkpoints.restore_model(step, role, model.trainable)
    except DamagedError as error:
        raise UserError(f"{error} {_way_back(folder)}") from error
    checkpoints.close()
    return model.at(learnt)


def load_aligned_proxy(config: Config, mesh: Mesh, which: Which | int | None = None) -> Model:
    """Returns the proxy that ``align`` trained; ``which`` defaults to ``export.state``."""
    return load_finished(
        config.proxy,
        config.folder / "proxy",
        role="proxy",
        seed=config.seed,
        mesh=mesh,
        which=config.export.state if which is None else which,
    )


def _way_back(folder: Path) -> str:
    return (
        "Put its files back from a copy. Otherwise choose the other state with export.state (best, "
        f"last), or remove {folder} to train this stage again."
    )


def aligned_proxy_identity(config: Config) -> dict[str, Any]:
    """Returns what identifies the state that ``load_aligned_proxy`` restores."""
    folder = config.folder / "proxy"
    step = finished_step(folder, config.export.state)
    return {"stage": stage_identity(folder), "step": step}


def load_student(config: Config, mesh: Mesh, which: Which | int | None = None) -> Model:
    """Returns the student that ``distill`` trained; ``which`` defaults to ``export.state``."""
    return load_finished(
        config.student,
        config.folder / "student",
        role="student",
        seed=config.seed,
        mesh=mesh,
        which=config.export.state if which is None else which,
    )
