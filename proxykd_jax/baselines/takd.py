"""TAKD (arXiv 1902.03393), with a black-box teacher: an assistant between teacher and student.

The first hop can only be the NLL of the teacher's answers. ``assistant: finetuned`` takes it on D_w
and D_p, without preferences, so nothing is sampled; ``raw`` leaves the proxy as it is, which is
what the paper blames. The second is (1 - lam) NLL + lam T^2 KL(assistant || student) at temperature
T on the teacher's answers, every example alike.

All of this are values of ordinary keys (``Takd.defines`` in ``config/methods.py``): the assistant
is what ``align`` leaves behind, its soft labels are stored at T, and the loss is eq. 11's with
``alpha`` = lam.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import label_phase, teacher_rows, teacher_splits
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """The teacher's answers that the student sees."""
    return scoring.teacher_rows()


def phases(run: StageRun) -> list[Phase]:
    """NLL of the teacher's answers, and the assistant's distribution on them."""
    rows = teacher_rows(run.config, run.corpus)
    return [label_phase(run, rows, nll_splits=teacher_splits(run.config))]
