"""Proxy-KD (paper, eq. 11): NLL of the teacher's answers + alpha x weighted KL from the proxy.

With ``distill.alpha: 0`` it is black-box KD. Fresh prompts, where the config names some, are
answered and scored by the aligned proxy (beyond the paper).
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import (
    fit,
    fresh_rows,
    label_lesson,
    teacher_rows,
    teacher_splits,
    text_lesson,
)
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.student import StudentRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """All of the teacher's answers that the student sees, and the proxy's to fresh prompts."""
    return {**scoring.teacher_rows(), **scoring.answer_fresh_prompts()}


def train(run: StudentRun) -> None:
    """Eq. 11 on D_s or all of D."""
    config, corpus = run.config, run.corpus
    rows = teacher_rows(config, corpus)
    if run.labels is None:
        fit(run, text_lesson(config, rows))
        return
    rows |= fresh_rows(config, corpus)
    fit(run, label_lesson(config, rows, run.labels, nll_splits=teacher_splits(config)))
