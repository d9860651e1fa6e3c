"""Black-box KD (the paper's eq. 1 and the first rows of its Table 1): only the NLL of the
teacher's answers. No proxy is loaded, aligned or scored.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import teacher_rows, text_phase
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: this method needs no soft labels."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Returns the NLL phase on D_s, or on all of D."""
    return [text_phase(run, teacher_rows(run.config, run.corpus))]
