"""GKD (arXiv 2306.13649): a divergence from the scorer on the student's own or on given answers.

With probability lambda (``student_share``) the student answers the prompts of a step's batch;
otherwise the batch holds given answers, the teacher's or the scorer's. On both the student
minimises the generalised JSD to the scorer, averaged over an answer's tokens, then over answers.
Unlike in policy-gradient methods, no gradient goes through sampling: the answers are constants.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax

from proxykd_jax.baselines.beside_scorer import ScoredSpec, both_logits, scorer_text
from proxykd_jax.baselines.online import GiveAnswers, answering_phase, warmup_phase
from proxykd_jax.baselines.rollouts import (
    Answer,
    AnswerBatch,
    Answering,
    Places,
    answer_figures,
    given_answers,
    student_answers,
)
from proxykd_jax.baselines.sampling_programs import scored_answer_program, scored_step_program
from proxykd_jax.config.online_methods import Gkd
from proxykd_jax.data.collate import Rows
from proxykd_jax.losses import (
    batch_count,
    batch_terms,
    generalized_jsd_tokens,
    mixed_objective,
)
from proxykd_jax.training.abstract import Program
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective
from proxykd_jax.training.batches import Joined
from proxykd_jax.training.distillation import teacher_rows
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import SCORER_TEXT, Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import Weights


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: the scorer is loaded while the student trains."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Returns the warm-up, then GKD."""
    config, method = run.config, run.config.method
    assert isinstance(method, Gkd)
    # If the student gives all answers, only the prompts of these rows are used.
    fixed = method.fixed if method.student_share < 1 else "teacher"
    text = {"teacher": teacher_rows(config, run.corpus)}
    if method.reads_scorer_text:
        text[SCORER_TEXT] = scorer_text(run)
    rows = Joined(text[fixed])
    objective = GkdObjective(method.beta, method.scorer_temperature, config.distill.reduction)
    return [
        warmup_phase(run, method, text.get(method.warmup_text, {})),
        answering_phase(
            run,
            method,
            rows,
            objective,
            _answers(run, method),
            programs=functools.partial(_programs, run, method),
        ),
    ]


def _answers(run: StageRun, method: Gkd) -> GiveAnswers:
    """Returns a function that lets the current student answer, or returns the given answers."""
    answering = Answering.of(run, method, method.temperature)

    def answers(student: Model, places: Places, step: int) -> list[Answer | None]:
        if not student_answers(run.config.seed, step, method.student_share):
            return given_answers(places, run.corpus.end_token_ids)
        return answering.answer(student, places, step)

    return answers


def _programs(run: StageRun, method: Gkd, phase: Phase) -> list[Program]:
    step = scored_step_program(run, phase)
    if method.student_share == 0:
        return [step]
    options: dict[str, Any] = {"temperature": method.temperature, "times": method.student_share}
    return [scored_answer_program(run, method, phase, **options), step]


@dataclass(frozen=True)
class GkdObjective:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q and scorer p.

    Attributes:
      beta: the scorer's weight; 0 is the forward KL and 1 the reverse KL.
      scorer_temperature: temperature of p; the student's is 1.
      reduction: as in ``batch_terms``; the paper's is ``example_mean``.
      weight: factor of the loss, but not of the metric.
    """

    beta: float
    scorer_temperature: float
    reduction: str
    weight: float = 1.0

    def counts(self, batch: AnswerBatch) -> Counts:
        return {"divergence": batch_count(batch.rows.mask_BL, reduction=self.reduction)}

    def share(
        self,
        models: dict[str, Weights],
        batch: AnswerBatch,
        counts: Counts,
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.rows

        def divergence(student: jax.Array, scorer: jax.Array, mask: jax.Array) -> jax.Array:
            tempered = scorer / self.scorer_temperature
            return generalized_jsd_tokens(tempered, student, mask, beta=self.beta)

        value_BL = both_logits(
            models, rows, spec, divergence, rows.mask_BL, dropout_key=dropout_key
        )
        term = batch_terms(value_BL, rows.mask_BL, reduction=self.reduction)
        loss, metrics = mixed_objective(
            {"divergence": term}, {"divergence": self.weight}, counts=counts
        )
        return loss, {**metrics, **answer_figures(batch)}

    def terms(self) -> dict[str, Objective]:
        return {}
