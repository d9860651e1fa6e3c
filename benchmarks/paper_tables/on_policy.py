"""Students that learn from their own samples, and SODA, whose samples are the base student's.

The objectives, and the batches that they take, are the product's; here all seeds answer at once.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.models import draw_answers
from benchmarks.paper_tables.offline import TRUTH, Material, Method, Source
from benchmarks.paper_tables.offline import batches_of as offline_batches
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import MakeBatch, Run, plan_rows, planned
from proxykd_jax.baselines.beside_scorer import ScoredSpec, sampling_time_logps
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.minillm import (
    MiniLlmObjective,
    inner_batches,
    rollout_batch,
    take_answers,
)
from proxykd_jax.baselines.on_policy import OnPolicyObjective
from proxykd_jax.baselines.rollouts import AnswerBatch, student_answers
from proxykd_jax.config import PreferenceConfig
from proxykd_jax.config.online_methods import Gkd, MiniLlm, OnPolicy
from proxykd_jax.generation.decode import DrawSettings, Mixing, PromptBatch
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.batch_objectives import AlignObjective, NllObjective, Objective
from proxykd_jax.types import TokenBatch

SODA_BETA = 0.1  # its paper's is not known


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


def sampled_answers(
    constants: Any,
    params: Any,
    prompts: PromptBatch,
    round_index: jax.Array,
    spec: ScoredSpec,
    mixing: Mixing | None = None,
) -> AnswerBatch:
    """The student's answers as it is now, or those of a mixture with the scorer."""
    settings = DrawSettings(1.0, 1.0, w.VOCAB_SIZE, (w.END,), mixing)
    other = None if mixing is None else constants["frozen"]["scorer"]
    state = draw_answers(
        params,
        prompts,
        constants["seed"],
        round_index,
        spec.config,
        settings,
        w.MAX_ANSWER,
        other,
    )
    answers_BT = state.tokens_BS[:, : w.MAX_ANSWER]
    rows = rows_of_samples(prompts.tokens_BL, answers_BT, state.count_B)
    return jax.lax.stop_gradient(AnswerBatch(rows, state.finished_B, state.count_B > 0))


@functools.lru_cache(maxsize=8)
def answered_batch(spec: ScoredSpec) -> MakeBatch:
    """A step's batch: of the student's answers, or of given ones where it does not answer."""

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> AnswerBatch:
        prompts, given, own = data
        return answers_or(given, own, constants, params, prompts, step, spec)

    return make


def answers_or(given: AnswerBatch, own: jax.Array, *asked: Any) -> AnswerBatch:
    """``sampled_answers(*asked)`` where the student answers, else what is given."""
    answers: AnswerBatch = jax.lax.cond(own, lambda: sampled_answers(*asked), lambda: given)
    return answers


@functools.lru_cache(maxsize=8)
def rollout_batches(spec: ScoredSpec, updates: int) -> MakeBatch:
    """The batches of all updates on a rollout, whose answers scorer and student draw together."""
    method = MiniLlm()
    mixing = Mixing(spec.scorer.config, method.teacher_mixing)

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> Any:
        prompts, places_UB = data
        answers = sampled_answers(constants, params, prompts, step // updates, spec, mixing)
        old_RL, scorer_RL = sampling_time_logps(
            params, constants["frozen"], answers.rows, spec=spec
        )

        def batch(places: jax.Array) -> Any:
            taken = take_answers(answers, places)
            return rollout_batch(taken, old_RL[places], scorer_RL[places], None, method)

        return batch(places_UB) if updates == 1 else jax.vmap(batch)(places_UB)

    return make


@dataclass(frozen=True)
class OnPolicyMethod:
    """How a student learns from its own samples.

    Attributes:
      scorer: state of the proxy that sees them.
      section: the product's method.
      fixed: the other answers of GKD.
    """

    scorer: str
    section: Gkd | OnPolicy | MiniLlm
    fixed: Source | None = None


def objective_of(section: Gkd | OnPolicy | MiniLlm, reduction: str) -> Objective:
    """The product's; ``reduction`` is for the method that has none of its own."""
    if isinstance(section, MiniLlm):
        return MiniLlmObjective.of(section)
    if isinstance(section, Gkd):
        return GkdObjective(section.beta, section.scorer_temperature, "example_mean")
    return OnPolicyObjective(section.form, section.coef, reduction)


def train(
    material: Material,
    method: OnPolicyMethod,
    student_S: Any,
    validation: TokenBatch,
    **options: Any,
) -> Run:
    """Trains the students of all seeds on prompts of D_s."""
    setting, section = material.setting, method.section
    steps, every = setting.student_steps, setting.config.distill.stop.every
    spec = ScoredSpec(setting.student, setting.proxy, w.VOCAB_SIZE)
    run = Run.start(setting.student, setting.distill_optimizer, student_S, validation)
    updates = 1
    if isinstance(section, MiniLlm):
        epochs, count = rollout_sizes(setting, section)
        updates = epochs * count
        batches = _rollouts(material, epochs, count)
        make_batch = rollout_batches(spec, updates)
    else:
        batches = _answered(material, method)
        make_batch = answered_batch(spec)
    run.train(
        objective_of(section, setting.config.distill.reduction),
        batches,
        steps // updates,
        every=max(every // updates, 1),
        make_batch=make_batch,
        constants={
            "seed": np.asarray(material.seeds, np.uint32),
            "frozen": {"student": {}, "scorer": (material.proxies[method.scorer], None)},
        },
        step_spec=spec,
        updates=updates,
        **options,
    )
    return run


def _answered(material: Material, method: OnPolicyMethod) -> Any:
    """Data of ``answered_batch``: prompts, the same prompts' fixed answers, who answers."""
    setting, section = material.setting, method.section
    steps = setting.student_steps
    share = section.student_share if isinstance(section, Gkd) else 1.0
    pools, plans, owns = [], [], []
    for seed, rows, given in zip(
        material.seeds,
        material.rows("distill", TRUTH),
        offline_batches(material, Method((method.fixed or Source("distill"),))),
        strict=True,
    ):
        assert isinstance(given, TokenBatch)
        there_B = given.mask_BL.any(axis=-1)
        ends_B = (given.mask_BL & (given.labels_BL == w.END)).any(axis=-1)
        fixed = AnswerBatch(given, ends_B, np.zeros_like(there_B))
        pools.append((padded_prompts(rows), fixed))
        plans.append(plan_rows(len(rows.rows), setting.config.distill, seed, "distill", steps))
        owns.append(np.array([student_answers(seed, step, share) for step in range(steps)]))
    both = planned(pools, plans)
    return lambda start, stop: (*both(start, stop), np.stack(owns)[:, start:stop])


def rollout_sizes(setting: Setting, section: MiniLlm) -> tuple[int, int]:
    """(inner epochs, batches of a rollout): the method's, or fewer that divide the steps."""
    steps = setting.student_steps
    epochs = math.gcd(section.inner_epochs, steps)
    most = max(section.rollouts // setting.config.distill.batch_size, 1)
    counts = range(1, most + 1)
    return epochs, max(count for count in counts if steps % (epochs * count) == 0)


def _rollouts(material: Material, epochs: int, count: int) -> Any:
    """Data of ``rollout_batches``: the prompts of a rollout and the places of each update."""
    setting = material.setting
    steps, size = setting.student_steps, setting.config.distill.batch_size
    num = steps // (epochs * count)
    pools, plans, places = [], [], []
    for seed, rows in zip(material.seeds, material.rows("distill", TRUTH), strict=True):
        plan = plan_rows(len(rows.rows), setting.config.distill, seed, "distill", 2 * steps)
        # Without the padding at an epoch's end, so that every update is of a whole batch.
        plans.append(np.resize(plan[plan >= 0], (num, count * size)))
        pools.append(padded_prompts(rows))
        there_R = np.ones(count * size, bool)
        places.append(
            [
                list(
                    inner_batches(
                        there_R,
                        size,
                        epochs=epochs,
                        seed=purpose_seed(seed, f"distill/inner/{rollout}"),
                    )
                )
                for rollout in range(num)
            ]
        )
    prompts, places_SZUB = planned(pools, plans), np.asarray(places)
    if epochs * count == 1:
        places_SZUB = places_SZUB[:, :, 0]
    return lambda start, stop: (prompts(start, stop), places_SZUB[:, start:stop])


def padded_prompts(rows: Any, number: int = 0) -> PromptBatch:
    """All prompts and a row at the end that draws nothing; ``number`` is the answer's."""
    ids = [f"{row_id}/student/{number}" for row_id in rows.ids]
    return _with_padding(models.prompt_batch(rows.prompts_NP, ids, w.MAX_ANSWER))


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
