"""Black-box KD (the paper's eq. 1 and the first rows of its Table 1): the NLL of the teacher's
answers, and nothing else. No proxy is loaded, aligned or asked.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import fit, teacher_rows, text_lesson
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.student import StudentRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Nothing is scored."""
    return {}


def train(run: StudentRun) -> None:
    """NLL on D_s or all of D."""
    fit(run, text_lesson(run.config, teacher_rows(run.config, run.corpus)))
