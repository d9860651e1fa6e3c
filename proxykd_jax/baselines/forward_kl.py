"""White-box KD with the forward KL (SeqKD + KL; the paper's Table 1, rows of a Llama-2-70B-chat
teacher): the student learns a white-box model's own answers and its distribution on them.

1. The scorer (the raw or the aligned proxy) answers every prompt of D_s once, at temperature 1.
2. Its soft labels on these answers are stored, as Proxy-KD stores them on the teacher's.
3. The student minimises ``nll_weight`` NLL + ``kl_weight`` KL(scorer || student) on them.

The teacher's answers of D_s are not used; those of D_w and D_p are used only to align the scorer.
With ``kl_weight: 0`` the method is SeqKD.
"""

from __future__ import annotations

from proxykd_jax.data.collate import Rows
from proxykd_jax.training.distillation import answered_rows, label_phase
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import SCORER_TEXT, Scoring
from proxykd_jax.training.stage_run import StageRun


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns the scorer's own answers to the prompts of D_s."""
    return scoring.answer_distill_prompts()


def phases(run: StageRun) -> list[Phase]:
    """Returns the phase of NLL and KL on these answers; all examples have equal weights."""
    rows = {SCORER_TEXT: answered_rows(run, SCORER_TEXT, run.corpus.split("distill"))}
    return [label_phase(run, rows, nll_splits=(SCORER_TEXT,))]
