"""Finished proxies and students: which checkpoint counts, and the model that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from jax.sharding import Mesh

from proxykd_jax.artifacts import MANIFEST, read_json, stage_identity
from proxykd_jax.config import Config, ModelSection, OptimizerConfig
from proxykd_jax.errors import UserError
from proxykd_jax.training.checkpoint import Checkpoints
from proxykd_jax.training.discriminator_model import adversarial_optimizer, init_discriminator
from proxykd_jax.training.model import Model, load_for_training
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import abstract_state

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
    optimizer: OptimizerConfig,
    folder: Path,
    *,
    role: str,
    seed: int,
    mesh: Mesh,
    which: Which | int,
    discriminates: bool = False,
) -> Model:
    """The model of a finished stage.

    Args:
      section: where its frozen weights come from.
      optimizer: of the stage, for the structure of its state.
      folder: the stage's folder.
      role, seed, mesh: as in ``load_for_training``.
      which: ``best``, ``last``, or the step of a checkpoint that was kept.
      discriminates: a discriminator learnt beside the model.

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
    # The learning rate's course does not change the structure of the optimizer's state.
    chain, trainable = make_optimizer(optimizer, 1), model.trainable
    if discriminates:
        chain = adversarial_optimizer(optimizer, 1, discriminator_learning_rate=None)
        trainable = {"student": trainable, "discriminator": init_discriminator(model, mesh)}
    state, _ = checkpoints.restore(step, abstract_state(trainable, chain, mesh))
    checkpoints.close()
    return model.at(state.trainable["student"] if discriminates else state.trainable)


def load_aligned_proxy(config: Config, mesh: Mesh, which: Which | int | None = None) -> Model:
    """The proxy that ``align`` left behind; ``which`` defaults to ``export.state``."""
    return load_finished(
        config.proxy,
        config.align.optimizer,
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
        config.distill.optimizer,
        config.folder / "student",
        role="student",
        seed=config.seed,
        mesh=mesh,
        which=config.export.state if which is None else which,
        discriminates=config.method.discriminates,
    )
