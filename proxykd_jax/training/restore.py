"""Finished proxies and students: which checkpoint counts, and the model that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from proxykd_jax.artifacts import MANIFEST, read_json, stage_identity
from proxykd_jax.config import Config, ModelSection
from proxykd_jax.errors import UserError
from proxykd_jax.training.checkpoint import Checkpoints
from proxykd_jax.training.model import Model, load_for_training

Which = Literal["best", "last"]


def finished_step(folder: Path, which: Which) -> int | None:
    """The step that ``best`` or ``last`` means in a finished stage; None where nothing learnt."""
    manifest = read_json(folder / MANIFEST)
    if manifest.get("status") != "complete":
        raise UserError(f"{folder} is not complete; run its stage again, which goes on with it.")
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
    """The model of a finished stage.

    Args:
      section: where its frozen weights come from.
      folder: the stage's folder.
      role, seed, mesh: as in ``load_for_training``.
      which: ``best``, ``last``, or the step of a checkpoint that was kept.

    Raises:
      UserError: not finished, no such checkpoint, or damaged files.
    """
    model = load_for_training(section, role=role, seed=seed, mesh=mesh)
    step = which if isinstance(which, int) else finished_step(folder, which)
    if step is None:
        return model
    checkpoints = Checkpoints(folder)
    if step not in checkpoints.steps():
        raise UserError(
            f"{folder} keeps no checkpoint of step {step}; it has {checkpoints.steps()}."
        )
    learnt = checkpoints.restore_model(step, role, model.trainable)
    checkpoints.close()
    return model.at(learnt)


def load_aligned_proxy(config: Config, mesh: Mesh, which: Which | int | None = None) -> Model:
    """The proxy that ``align`` left behind; ``which`` defaults to ``export.state``."""
    return load_finished(
        config.proxy,
        config.folder / "proxy",
        role="proxy",
        seed=config.seed,
        mesh=mesh,
        which=config.export.state if which is None else which,
    )


def aligned_proxy_identity(config: Config) -> dict[str, Any]:
    """What the state that ``load_aligned_proxy`` takes is known by."""
    folder = config.folder / "proxy"
    step = finished_step(folder, config.export.state)
    return {"stage": stage_identity(folder), "step": step}


def load_student(config: Config, mesh: Mesh, which: Which | int | None = None) -> Model:
    """The student that ``distill`` left behind."""
    return load_finished(
        config.student,
        config.folder / "student",
        role="student",
        seed=config.seed,
        mesh=mesh,
        which=config.export.state if which is None else which,
    )
