"""GKD (arXiv 2306.13649): a divergence from the scorer on answers, the student's own or given ones.

A step's batch is answered by the student with probability lambda (``student_share``), else it holds
the fixed answers, the teacher's or the scorer's. On either the student minimises the generalised
JSD to the scorer, mean over an answer's tokens, then over answers. The answers are constants: no
gradient goes through sampling, which separates GKD from policy gradients.
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
    """Nothing is scored beforehand: the scorer is there while the student trains."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Warm-up, then GKD."""
    config, method = run.config, run.config.method
    assert isinstance(method, Gkd)
    # Without fixed answers only the prompts of these rows are looked at.
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
    """The answers of the student as it is when a batch is asked for, or given ones."""

    def answers(student: Model, places: Places, step: int) -> list[Answer | None]:
        if not student_answers(run.config.seed, step, method.student_share):
            return given_answers(places, run.corpus.end_token_ids)
        answering = Answering.of(run, method, method.temperature)
        return answering.answer(student.weights, places, step)

    return answers


def _programs(run: StageRun, method: Gkd, phase: Phase) -> list[Program]:
    step = scored_step_program(run, phase)
    if method.student_share == 0:
        return [step]
    options: dict[str, Any] = {"temperature": method.temperature, "times": method.student_share}
    return [scored_answer_program(run, method, phase, **options), step]


@dataclass(frozen=True)
class GkdObjective:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q; p is the scorer.

    Attributes:
      beta: on the scorer; 0 and 1 are the forward and the reverse KL.
      scorer_temperature: of p; the student's is 1.
      reduction: as in ``batch_terms``; the paper's is ``example_mean``.
      weight: factor of the loss, not of the metric.
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
