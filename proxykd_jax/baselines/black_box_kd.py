"""Black-box KD (the paper's eq. 1 and the first rows of its Table 1): the NLL of the teacher's
answers, and nothing else. No proxy is loaded, aligned or asked.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import teacher_rows, text_phase
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Nothing is scored."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """NLL on D_s or all of D."""
    return [text_phase(run, teacher_rows(run.config, run.corpus))]
