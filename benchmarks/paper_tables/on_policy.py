"""Students that learn from their own samples, and SODA, whose samples are the base student's.

The scorer (the proxy) sees every sample. A batch may hold rows that are not the student's beside
those that are: GKD's lambda is a share of each batch's rows here, not of the batches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.models import draw_answers, logits_of
from benchmarks.paper_tables.offline import TRUTH, Material, Method, Source
from benchmarks.paper_tables.offline import batches_of as offline_batches
from benchmarks.paper_tables.training import MakeBatch, Run, plan_rows, planned
from proxykd_jax.config import PreferenceConfig
from proxykd_jax.generation.decode import DrawSettings, PromptBatch
from proxykd_jax.losses import (
    Term,
    batch_count,
    batch_terms,
    generalized_jsd_tokens,
    log_ratio_rewards,
    mixed_objective,
    policy_gradient_tokens,
    rewards_to_go,
    single_step_kl_tokens,
    token_logps,
)
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.training.logprobs import concatenate
from proxykd_jax.training.objectives import AlignObjective, NllObjective, Objective
from proxykd_jax.training.state import ModelSpec, Tree
from proxykd_jax.types import TokenBatch

SODA_BETA = 0.1  # its paper's is not known
MINILLM_CLIP = 0.2


@flax.struct.dataclass
class ScoredRows:
    """Rows with the scorer's distribution at every place.

    Attributes:
      rows: the tokens.
      scorer_logits_BLV: float32.
    """

    rows: TokenBatch
    scorer_logits_BLV: Any


@dataclass(frozen=True)
class DivergenceObjective:
    """GKD's divergence between scorer and student; beta 1 is the reverse KL, 0 the forward."""

    beta: float
    reduction: str

    def counts(self, batch: ScoredRows) -> dict[str, jax.Array]:
        return {"divergence": batch_count(batch.rows.mask_BL, reduction=self.reduction)}

    def share(
        self,
        params: Tree,
        adapter: Tree | None,
        batch: ScoredRows,
        counts: dict[str, jax.Array],
        spec: ModelSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Term]]:
        mask_BL = batch.rows.mask_BL
        logits_BLV = logits_of(spec.config, params, batch.rows)
        values_BL = generalized_jsd_tokens(
            batch.scorer_logits_BLV, logits_BLV, mask_BL, beta=self.beta
        )
        terms = {"divergence": batch_terms(values_BL, mask_BL, reduction=self.reduction)}
        return mixed_objective(terms, {"divergence": 1.0}, counts=counts)

    def terms(self) -> dict[str, Objective]:
        return {}


@dataclass(frozen=True)
class MiniLlmObjective:
    """MiniLLM without teacher-mixed sampling and with one epoch on each batch of samples.

    The exact gradient of each token's own reward, and the policy gradient of those after it.
    """

    clip: float
    reduction: str

    def counts(self, batch: ScoredRows) -> dict[str, jax.Array]:
        count = batch_count(batch.rows.mask_BL, reduction=self.reduction)
        return {"single_step": count, "long": count}

    def share(
        self,
        params: Tree,
        adapter: Tree | None,
        batch: ScoredRows,
        counts: dict[str, jax.Array],
        spec: ModelSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, Term]]:
        rows, scorer_BLV = batch.rows, batch.scorer_logits_BLV
        logits_BLV = logits_of(spec.config, params, rows)
        logps_BL = token_logps(logits_BLV, rows.labels_BL)
        # The samples are of this very student.
        old_BL = jax.lax.stop_gradient(logps_BL)
        scorer_BL = token_logps(scorer_BLV, rows.labels_BL)
        rewards_BL = log_ratio_rewards(scorer_BL, old_BL, rows.mask_BL)
        returns_BL = rewards_to_go(rewards_BL, rows.mask_BL, include_current=False)
        values = {
            "single_step": single_step_kl_tokens(scorer_BLV, logits_BLV, rows.mask_BL),
            "long": policy_gradient_tokens(
                logps_BL, old_BL, returns_BL, rows.mask_BL, clip=self.clip
            ),
        }
        terms = {
            name: batch_terms(values_BL, rows.mask_BL, reduction=self.reduction)
            for name, values_BL in values.items()
        }
        return mixed_objective(terms, dict.fromkeys(terms, 1.0), counts=counts)

    def terms(self) -> dict[str, Objective]:
        return {}


def rows_of_samples(prompts_BP: jax.Array, answers_BT: jax.Array, count_B: jax.Array) -> TokenBatch:
    """What ``collate_rows`` makes of prompts and answers of ``count_B`` tokens, traceable."""
    whole = jnp.concatenate([prompts_BP, answers_BT], axis=1)
    prompt = prompts_BP.shape[1]
    place_1L = jnp.arange(whole.shape[1] - 1)[None, :]
    inside_BL = place_1L < (prompt + count_B - 1)[:, None]
    return TokenBatch(
        tokens_BL=jnp.where(inside_BL, whole[:, :-1], 0),
        labels_BL=jnp.where(inside_BL, whole[:, 1:], 0),
        mask_BL=inside_BL & (place_1L >= prompt - 1),
        segment_ids_BL=inside_BL.astype(jnp.int32),
        positions_BL=jnp.where(inside_BL, place_1L, 0),
        example_mask_BS=(count_B > 0)[:, None],
    )


@functools.lru_cache(maxsize=8)
def sampled_batch(student: ModelConfig, proxy: ModelConfig) -> MakeBatch:
    """A step's batch: the student's samples of this step, other rows, and the scorer's view."""
    settings = DrawSettings(1.0, 1.0, w.VOCAB_SIZE, (w.END,))

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> ScoredRows:
        prompts, others = data
        state = draw_answers(
            params, prompts, constants["seed"], step, student, settings, w.MAX_ANSWER
        )
        answers_BT = state.tokens_BS[:, : w.MAX_ANSWER]
        rows = rows_of_samples(prompts.tokens_BL, answers_BT, state.count_B)
        rows = jax.lax.stop_gradient(concatenate(rows, others))
        return ScoredRows(rows, logits_of(proxy, constants["scorer"], rows))

    return make


@dataclass(frozen=True)
class OnPolicyMethod:
    """How a student learns from its own samples.

    Attributes:
      scorer: state of the proxy that sees them.
      objective: ``minillm``, or GKD's beta.
      share: of a batch's rows that are the student's own samples.
      others: where the rest comes from.
    """

    scorer: str
    objective: str | float
    share: float = 1.0
    others: Source | None = None


def train(
    material: Material,
    method: OnPolicyMethod,
    student_S: Any,
    validation: TokenBatch,
    **options: Any,
) -> Run:
    """Trains the students of all seeds on prompts of D_s."""
    setting, distill = material.setting, material.setting.config.distill
    objective: Objective
    if method.objective == "minillm":
        objective = MiniLlmObjective(MINILLM_CLIP, distill.reduction)
    else:
        objective = DivergenceObjective(float(method.objective), distill.reduction)
    run = Run.start(setting.student, setting.distill_optimizer, student_S, validation)
    own = round(distill.batch_size * method.share)
    prompts, others = [], []
    fixed = method.others or Source("distill")
    for seed, rows, batch in zip(
        material.seeds,
        material.rows("distill", TRUTH),
        offline_batches(material, Method((fixed,))),
        strict=True,
    ):
        plan = plan_rows(len(rows.rows), distill, seed, "distill", setting.student_steps)
        asked = models.prompt_batch(rows.prompts_NP, rows.ids, w.MAX_ANSWER)
        prompts.append((_with_padding(asked), plan[:, :own]))
        others.append((batch, plan[:, own:]))
    own_batches, other_batches = (planned(*zip(*part, strict=True)) for part in (prompts, others))
    run.train(
        objective,
        lambda start, stop: (own_batches(start, stop), other_batches(start, stop)),
        setting.student_steps,
        every=distill.stop.every,
        make_batch=sampled_batch(setting.student_model, setting.proxy_model),
        constants={
            "seed": np.asarray(material.seeds, np.uint32),
            "scorer": material.proxies[method.scorer],
        },
        **options,
    )
    return run


def _with_padding(batch: PromptBatch) -> PromptBatch:
    """With a row at the end that draws nothing."""
    padded: PromptBatch = jax.tree.map(lambda x: np.concatenate([x, x[-1:]]), batch)
    budgets = padded.budgets_B.copy()
    budgets[-1] = 0
    return padded.replace(budgets_B=budgets)


def train_soda(material: Material, student_S: Any, validation: TokenBatch, **options: Any) -> Run:
    """SODA: a warm-up by NLL, then DPO against the base student's answers, reference the warmed."""
    setting, distill = material.setting, material.setting.config.distill
    rows = material.rows("distill", TRUTH)
    model = setting.student_model
    pairs = px.make_pairs(model, student_S, rows, seeds=material.seeds, salt=0)
    run = Run.start(setting.student, setting.distill_optimizer, student_S, validation)
    warmup = max(round(setting.student_steps * setting.sizes.warmup_share), 1)
    plans = [
        plan_rows(len(each.rows), distill, seed, "distill", setting.student_steps)
        for each, seed in zip(rows, material.seeds, strict=True)
    ]
    every = distill.stop.every
    nll = NllObjective(distill.reduction, distill.nll_weight)
    first = [plan[:warmup] for plan in plans]
    run.train(nll, planned([each.batch for each in rows], first), warmup, every=every)
    pairs = px.with_references(setting.student, run.last, pairs)
    preference = PreferenceConfig(loss="dpo", beta=SODA_BETA)
    objective = AlignObjective(preference, distill.reduction, 0.0, 1.0)
    px.pair_phase(run, objective, pairs, [plan[warmup:] for plan in plans], every=every, **options)
    return run
