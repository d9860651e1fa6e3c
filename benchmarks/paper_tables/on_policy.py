"""Students that learn from their own samples, and SODA, whose samples are the base student's.

Objectives, orders and the batches of updates are the product's; here all seeds answer at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.models import draw_answers
from benchmarks.paper_tables.offline import DISTILL, TRUTH, Material, Method, Source, phases_of
from benchmarks.paper_tables.seeds import Rows
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import MakeBatch, Run, order_of
from proxykd_jax.baselines import method_of
from proxykd_jax.baselines.beside_scorer import ScoredSpec, sampling_time_logps
from proxykd_jax.baselines.minillm import inner_batches, rollout_batch, take_answers
from proxykd_jax.baselines.rollouts import AnswerBatch, student_answers
from proxykd_jax.config.methods import Soda
from proxykd_jax.config.online_methods import Gad, Gkd, MiniLlm, OnPolicy
from proxykd_jax.generation.decode import Mixing, PromptBatch
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.phase import Phase
from proxykd_jax.types import TokenBatch

SODA = Soda(beta=0.1)  # The beta of its paper is not known.


@dataclass(frozen=True)
class OnPolicyMethod:
    """How a student learns from its own samples.

    Attributes:
      scorer: the state of the proxy that sees them.
      section: the product's method.
    """

    scorer: str
    section: Gkd | OnPolicy | MiniLlm


def method_phases(
    material: Material, section: Gkd | OnPolicy | MiniLlm | Gad | Soda, **distill: Any
) -> list[Sequence[Phase]]:
    """The phases of a method of the product on D_s; of each the phase of every seed.

    Args:
      material, section: the study's, and the method.
      **distill: further keys of ``distill``.
    """
    keys = {**section.defines()["distill"], "data": DISTILL, **distill}
    runs = [
        material.setting.run("distill", seed, {DISTILL: rows}, method=section, distill=keys)
        for seed, rows in zip(material.seeds, material.rows(DISTILL), strict=True)
    ]
    return list(zip(*(method_of(run.config).phases(run) for run in runs), strict=True))


def text_orders(material: Material, steps: int) -> list[np.ndarray]:
    """The rows of so many steps on D_s, in the order of the NLL of its texts."""
    return [order_of(phase, steps) for phase in phases_of(material, Method((Source(DISTILL),)))]


# --- batches of one seed --------------------------------------------------------------------------


def rows_of_samples(
    prompts_BP: jax.Array, answers_BT: jax.Array, count_B: jax.Array, *, last_tokens: bool = False
) -> TokenBatch:
    """Does what ``collate_rows`` does to answers of ``count_B`` tokens, traceable.

    With ``last_tokens`` the rows have one position more, where the last token is an input.
    """
    whole = jnp.concatenate([prompts_BP, answers_BT], axis=1)
    prompt, length = prompts_BP.shape[1], whole.shape[1] - (not last_tokens)
    place_1L = jnp.arange(length)[None, :]
    labels_BL = jnp.pad(whole[:, 1:], ((0, 0), (0, 1)))[:, :length]
    end_B = prompt + count_B - 1
    inside_BL = place_1L < end_B[:, None]
    read_BL = place_1L < (end_B + (last_tokens & (count_B > 0)))[:, None]
    return TokenBatch(
        tokens_BL=jnp.where(read_BL, whole[:, :length], 0),
        labels_BL=jnp.where(inside_BL, labels_BL, 0),
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
    """The answers of the student as it is now, or of a mixture with the scorer."""
    answers_BT, count_B, finished_B = draw_answers(
        params,
        prompts,
        constants["seed"],
        round_index,
        spec.config,
        other=None if mixing is None else constants["frozen"]["scorer"],
        mixing=mixing,
    )
    rows = rows_of_samples(prompts.tokens_BL, answers_BT, count_B)
    return jax.lax.stop_gradient(AnswerBatch(rows, finished_B, count_B > 0))


@functools.lru_cache(maxsize=8)
def answered_batch(spec: ScoredSpec) -> MakeBatch:
    """A step's batch holds the student's answers, or given ones where it does not answer."""

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> AnswerBatch:
        (prompts, given), own = data
        return answers_or(given, own, constants, params, prompts, step, spec)

    return make


def answers_or(given: AnswerBatch, own: jax.Array, *asked: Any) -> AnswerBatch:
    """``sampled_answers(*asked)`` where the student answers, else what is given."""
    answers: AnswerBatch = jax.lax.cond(own, lambda: sampled_answers(*asked), lambda: given)
    return answers


@functools.lru_cache(maxsize=8)
def rollout_batches(spec: ScoredSpec, method: MiniLlm, updates: int) -> MakeBatch:
    """The batches of all updates on a rollout, whose answers scorer and student draw together."""
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

        return batch(places_UB[0]) if updates == 1 else jax.vmap(batch)(places_UB)

    return make


# --- training -------------------------------------------------------------------------------------


def train(
    material: Material,
    method: OnPolicyMethod,
    student_S: Any,
    validation: TokenBatch,
    **options: Any,
) -> Run:
    """Trains the students of all seeds on prompts of D_s."""
    section = method.section
    phases = method_phases(material, section)[-1]
    spec: Any = phases[0].spec
    run = Run.start(phases[0], material.setting.config.distill, student_S, validation)
    if isinstance(section, MiniLlm):
        epochs, count = rollout_sizes(material.setting, section)
        data = _rollouts(material, epochs, count)
        updates = epochs * count
        make_batch = rollout_batches(spec, section, updates)
    else:
        data, updates = _answered(material, method, phases), 1
        make_batch = answered_batch(spec)
    run.take(
        phases,
        **data,
        make_batch=make_batch,
        constants=beside_scorer(material, method.scorer),
        updates=updates,
        **options,
    )
    return run


def beside_scorer(material: Material, state: str) -> dict[str, Any]:
    """The constants of steps whose student answers beside a state of the proxy."""
    return {
        "seed": np.asarray(material.seeds, np.uint32),
        "frozen": {"student": {}, "scorer": (material.proxies[state], None)},
    }


def who_answers(material: Material, share: float) -> np.ndarray:
    """bool ``[S, Z]``, whether the student answers the batch of a step."""
    steps = range(material.setting.student_steps)
    return np.array([[student_answers(s, step, share) for step in steps] for s in material.seeds])


def _answered(
    material: Material, method: OnPolicyMethod, phases: Sequence[Phase]
) -> dict[str, Any]:
    """The data of ``answered_batch``: prompts, fixed answers to them, and who answers."""
    section = method.section
    from_scorer = isinstance(section, Gkd) and section.fixed == "scorer"
    given_S = material.rows(DISTILL, method.scorer if from_scorer else TRUTH)
    pools = []
    for rows, given in zip(material.rows(DISTILL), given_S, strict=True):
        finished = np.append(given.finished, False)
        fixed = AnswerBatch(given.batch, finished, np.zeros_like(finished))
        pools.append((padded_prompts(rows), fixed))
    share = section.student_share if isinstance(section, Gkd) else 1.0
    return {"pools": pools, "beside": [who_answers(material, share)]}


def rollout_sizes(setting: Setting, section: MiniLlm) -> tuple[int, int]:
    """(inner epochs, batches of a rollout): the method's, or fewer that divide the steps."""
    steps = setting.student_steps
    epochs = math.gcd(section.inner_epochs, steps)
    most = max(section.rollouts // setting.config.distill.batch_size, 1)
    counts = range(1, most + 1)
    return epochs, max(count for count in counts if steps % (epochs * count) == 0)


def _rollouts(material: Material, epochs: int, count: int) -> dict[str, Any]:
    """The data of ``rollout_batches``: a rollout's prompts, and the places of each update."""
    steps, size = material.setting.student_steps, material.setting.config.distill.batch_size
    num = steps // (epochs * count)
    there_R = np.ones(count * size, bool)

    def places(seed: int, rollout: int) -> list[np.ndarray]:
        order_seed = purpose_seed(seed, f"distill/inner/{rollout}")
        return list(inner_batches(there_R, size, epochs=epochs, seed=order_seed))

    return {
        "pools": [padded_prompts(rows) for rows in material.rows(DISTILL)],
        # The padding at an epoch's end is left out, so that every update is of a whole batch.
        "orders": [
            np.resize(order[order >= 0], (num, count * size))
            for order in text_orders(material, 2 * steps)
        ],
        "beside": [np.array([[places(s, r) for r in range(num)] for s in material.seeds])],
    }


def padded_prompts(rows: Rows, number: int = 0) -> PromptBatch:
    """All prompts and a last row that draws nothing; ``number`` tells a prompt's answers apart."""
    ids = [f"{row_id}/student/{number}" for row_id in rows.ids]
    batch = models.prompt_batch(rows.prompts_NP, ids, w.MAX_ANSWER)
    padded: PromptBatch = jax.tree.map(lambda x: np.concatenate([x, x[-1:]]), batch)
    padded.budgets_B[-1] = 0
    return padded


def train_soda(material: Material, student_S: Any, validation: TokenBatch, **options: Any) -> Run:
    """Trains by NLL, then by DPO against the base student's answers; the student between both is
    the reference."""
    setting, rows = material.setting, material.rows(DISTILL)
    warmup, preference = method_phases(material, SODA)
    pairs = px.make_pairs(setting.student_model, student_S, rows, seeds=material.seeds, salt=0)
    run = Run.start(warmup[0], setting.config.distill, student_S, validation)
    # Both phases go through the rows in one order.
    orders, first = text_orders(material, setting.student_steps), setting.warmup_steps
    run.take(warmup, orders=[order[:first] for order in orders])
    pairs = px.with_references(run.spec, run.last, pairs)
    run.take(preference, pools=pairs, orders=[order[first:] for order in orders], **options)
    return run
