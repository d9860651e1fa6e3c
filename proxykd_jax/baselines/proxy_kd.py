"""Proxy-KD (paper, eq. 11): NLL of the teacher's answers + alpha x weighted KL from the proxy.

With ``distill.alpha: 0`` it is black-box KD. Two options go beyond the paper. The aligned proxy can
answer and score fresh prompts, and with ``method.student_share`` some steps learn on the student's
own answers (``mixing``).
"""

from __future__ import annotations

from proxykd_jax.baselines.mixing import with_own_answers
from proxykd_jax.config.methods import ProxyKd
from proxykd_jax.data.collate import Rows
from proxykd_jax.training.batches import Joined
from proxykd_jax.training.console import Console
from proxykd_jax.training.distillation import (
    FRESH,
    fresh_rows,
    label_phase,
    teacher_rows,
    teacher_splits,
    text_phase,
)
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns the teacher's answers that the student sees, and the proxy's to fresh prompts."""
    return {**scoring.teacher_rows(), **scoring.answer_fresh_prompts()}


def phases(run: StageRun) -> list[Phase]:
    """Returns the phase of eq. 11 on D_s, or on all of D."""
    config, corpus, method = run.config, run.corpus, run.config.method
    assert isinstance(method, ProxyKd)
    rows = teacher_rows(config, corpus)
    if config.needs != "labels":
        if len(corpus.split(FRESH)):
            Console("distill").say(
                "WARNING: with distill.alpha 0 nothing is learnt from corpus.fresh_prompts"
            )
        return [text_phase(run, rows)]
    rows |= fresh_rows(run)
    phase = label_phase(run, rows, nll_splits=teacher_splits(config))
    return [
        with_own_answers(run, method, phase, Joined(rows)) if method.student_share > 0 else phase
    ]
