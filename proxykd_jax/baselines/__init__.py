"""The methods that can train a student (the paper's Table 1), one file each.

``distill.main`` runs the method that ``method_of(config)`` returns; ``score.main`` asks it what to
score. Each file defines two functions, ``to_score`` and ``phases``. A method's keys are in
``config/methods.py``, its losses in ``losses/``; the trainer, checkpoints and stores are shared.
"""

from __future__ import annotations

from typing import Protocol

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


class StudentMethod(Protocol):
    """The functions that each file of this folder defines."""

    def to_score(self, scoring: Scoring) -> dict[str, Rows]:
        """Returns the rows that ``score`` stores soft labels of, by split; draws the scorer's own
        answers first if they are among them. Called only if the method needs soft labels."""

    def phases(self, run: StageRun) -> list[Phase]:
        """Returns the phases of the student's training in order, and makes what they learn from."""


def method_of(config: Config) -> StudentMethod:
    """Returns the method that ``config.method`` names."""
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
