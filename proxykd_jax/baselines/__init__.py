"""The methods that a student can be trained by, one file each (the paper's Table 1).

``distill.main`` asks ``method_of(config)`` what to run; ``score.main`` asks it what to score. A
file is a method: two functions, ``to_score`` and ``phases``. Its keys are in ``config/methods.py``
and its losses in ``losses/``; the trainer, checkpoints and stores are shared.
"""

from __future__ import annotations

from typing import Protocol

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


class StudentMethod(Protocol):
    """What the files of this folder have."""

    def to_score(self, scoring: Scoring) -> dict[str, Rows]:
        """The rows that ``score`` stores soft labels of, by the name of their split; makes those
        that the scorer has to write first. Called only where the method needs soft labels."""

    def phases(self, run: StageRun) -> list[Phase]:
        """What the student's training consists of, in order; makes what it learns from first."""


def method_of(config: Config) -> StudentMethod:
    """The method that ``config.method`` names."""
    from proxykd_jax.baselines import (
        black_box_kd,
        forward_kl,
        gad,
        gkd,
        mentor_kd,
        minillm,
        on_policy,
        proxy_kd,
        random_labels,
        soda,
        takd,
    )

    match config.method.name:
        case "proxy_kd":
            return proxy_kd
        case "black_box_kd":
            return black_box_kd
        case "forward_kl":
            return forward_kl
        case "takd":
            return takd
        case "mentor_kd":
            return mentor_kd
        case "random_labels":
            return random_labels
        case "soda":
            return soda
        case "gkd":
            return gkd
        case "on_policy":
            return on_policy
        case "minillm":
            return minillm
        case "gad":
            return gad
