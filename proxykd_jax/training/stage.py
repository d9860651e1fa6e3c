"""A training stage as seen by others: the keys that determine it, and its results."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from proxykd_jax.artifacts import read_manifest
from proxykd_jax.config import Config
from proxykd_jax.config.schema import NOT_DECISIVE

# Keys that change the speed or the logs of a stage, but not what it learns.
_UNIMPORTANT: dict[str, Any] = {
    **dict.fromkeys(("checkpoint_every", "diagnose_every", "log_every"), True),
    **NOT_DECISIVE,
}


@dataclass(frozen=True)
class TrainedStage:
    """A finished training stage.

    Attributes:
      folder: folder of the stage, with its checkpoints.
      best_step: step of the lowest validation NLL; None without validation.
      last_step: the last step.
      results: what each phase reported: raw, warmup, round_01, ...; or untrained, train.
    """

    folder: Path
    best_step: int | None
    last_step: int
    results: list[dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> TrainedStage:
        """Reads the manifest of a stage."""
        manifest = read_manifest(folder)
        return TrainedStage(
            folder, manifest["best_step"], manifest["last_step"], manifest["results"]
        )


def training_settings(
    config: Config, stage: Literal["align", "distill"], role: Literal["proxy", "student"]
) -> dict[str, Any]:
    """Returns the keys that determine what a stage makes of its model."""
    section, model = getattr(config, stage), getattr(config, role)
    method = config.method
    other = stage == "distill" and method.changes_training
    return {
        **({"method": method.model_dump(mode="json")} if other else {}),
        "seed": config.seed,
        role: model.model_dump(mode="json", exclude={"config", "remat", "license"}),
        stage: section.model_dump(mode="json", exclude=_UNIMPORTANT),
    }
