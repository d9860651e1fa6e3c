"""On-policy distillation (Thinking Machines 2025): the reverse KL to the aligned proxy on answers
that the student gives during training.

``form: full`` takes KL(q || p) over the vocabulary at each position, which is GKD with lambda 1 and
beta 1. ``form: sampled`` uses the log-ratio of the drawn token as its advantage; the authors do so
because an API returns only the log-probs of tokens. Both have the same expected gradient; ``full``
has less variance. The method uses prompts alone, including fresh ones: after the warm-up no text of
the teacher is read and there is no NLL.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax

from proxykd_jax.baselines.beside_scorer import ScoredSpec, both_logits, scorer_text
from proxykd_jax.baselines.online import GiveAnswers, answering_phase, warmup_phase
from proxykd_jax.baselines.rollouts import (
    AnswerBatch,
    Answering,
    answer_figures,
)
from proxykd_jax.baselines.sampling_programs import scored_answer_program, scored_step_program
from proxykd_jax.config.online_methods import OnPolicy
from proxykd_jax.data.collate import Rows
from proxykd_jax.losses import (
    batch_count,
    batch_terms,
    mixed_objective,
    reverse_kl_tokens,
    sampled_reverse_kl_tokens,
    token_logps,
)
from proxykd_jax.training.abstract import Program
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective
from proxykd_jax.training.batches import Joined
from proxykd_jax.training.distillation import FRESH, teacher_rows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import Weights


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: the scorer is loaded while the student trains."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Returns the warm-up, then the training on the student's own answers."""
    config, method = run.config, run.config.method
    assert isinstance(method, OnPolicy)
    teacher, fresh = teacher_rows(config, run.corpus), run.corpus.split(FRESH)
    text = scorer_text(run) if method.reads_scorer_text else teacher
    prompts = Joined({**teacher, **({FRESH: fresh} if method.fresh_prompts and len(fresh) else {})})
    objective = OnPolicyObjective(method.form, method.coef, config.distill.reduction)
    return [
        warmup_phase(run, method, text),
        answering_phase(
            run,
            method,
            prompts,
            objective,
            _answers(run, method),
            programs=functools.partial(_programs, run, method),
        ),
    ]


def _answers(run: StageRun, method: OnPolicy) -> GiveAnswers:
    return Answering.of(run, method, 1.0, method.samples_per_prompt).answer


def _programs(run: StageRun, method: OnPolicy, phase: Phase) -> list[Program]:
    many = method.samples_per_prompt
    return [
        scored_answer_program(run, method, phase, times=many),
        scored_step_program(run, phase, answers=many),
    ]


@dataclass(frozen=True)
class OnPolicyObjective:
    """coef KL(q || p) on answers drawn from q, the student in training.

    A batch is trained on once, so the student that drew it is the one at the start of the step:
    this forward pass also gives the log-probs at sampling time. There is no dropout, because it
    would change the policy.

    Attributes:
      form: ``full`` or ``sampled``.
      coef: factor of the KL.
      reduction: as in ``batch_terms``.
    """

    form: str
    coef: float
    reduction: str

    def counts(self, batch: AnswerBatch) -> Counts:
        return {"objective": batch_count(batch.rows.mask_BL, reduction=self.reduction)}

    def share(
        self,
        models: dict[str, Weights],
        batch: AnswerBatch,
        counts: Counts,
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.rows

        def values(
            student: jax.Array, scorer: jax.Array, labels: jax.Array, mask: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            kl = reverse_kl_tokens(scorer, student, mask)
            if self.form == "full":
                return self.coef * kl, kl
            logps, scorer_logps = token_logps(student, labels), token_logps(scorer, labels)
            drawn = jax.lax.stop_gradient(logps)
            loss = sampled_reverse_kl_tokens(logps, drawn, scorer_logps, mask, coef=self.coef)
            return loss, jax.lax.stop_gradient(kl)

        value_BL, kl_BL = both_logits(models, rows, spec, values, rows.labels_BL, rows.mask_BL)
        value = batch_terms(value_BL, rows.mask_BL, reduction=self.reduction)
        kl = batch_terms(kl_BL, rows.mask_BL, reduction="token_mean")
        loss, metrics = mixed_objective({"objective": value}, {"objective": 1.0}, counts=counts)
        return loss, {**metrics, "reverse_kl": kl, **answer_figures(batch)}

    def terms(self) -> dict[str, Objective]:
        return {}
