"""TAKD (arXiv 1902.03393) with a black-box teacher: an assistant between teacher and student.

The first step can only be the NLL of the teacher's answers. ``assistant: finetuned`` trains the
proxy on D_w and D_p, without preferences, so nothing is sampled. ``raw`` leaves the proxy
unchanged, which is what the paper criticises. The second step minimises (1 - lam) NLL + lam T^2
KL(assistant || student) at temperature T on the teacher's answers, with equal weights.

All of this is expressed by ordinary keys (``Takd.defines`` in ``config/methods.py``): the assistant
is the result of ``align``, its soft labels are stored at T, and the loss is eq. 11 with ``alpha`` =
lam.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import label_phase, teacher_rows, teacher_splits
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns the teacher's answers that the student sees."""
    return scoring.teacher_rows()


def phases(run: StageRun) -> list[Phase]:
    """Returns the phase of NLL of the teacher's answers and KL to the assistant on them."""
    rows = teacher_rows(run.config, run.corpus)
    return [label_phase(run, rows, nll_splits=teacher_splits(run.config))]
