"""Proxy-KD whose student also learns on its own answers: ``baselines.mixing`` of all seeds.

Which kind a step is differs between seeds, so it is data, and the other kind is not computed.
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
from benchmarks.paper_tables import offline
from benchmarks.paper_tables.on_policy import answers_or, padded_prompts
from benchmarks.paper_tables.training import MakeBatch, Run, plan_rows, planned
from proxykd_jax.baselines.beside_scorer import ScoredSpec
from proxykd_jax.baselines.gkd import GkdObjective
from proxykd_jax.baselines.rollouts import AnswerBatch, student_answers
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective
from proxykd_jax.types import DistillBatch, TokenBatch


@flax.struct.dataclass
class EitherBatch:
    """A step's rows with their labels, the student's answers to their prompts, and which counts."""

    stored: DistillBatch
    own: AnswerBatch
    is_own: Any


@dataclass(frozen=True)
class EitherObjective:
    """The loss of one kind of step; ``baselines.mixing.MixedObjective`` where that is data."""

    stored: Objective
    own: GkdObjective

    def counts(self, batch: EitherBatch) -> dict[str, Counts]:
        return {"stored": self.stored.counts(batch.stored), "own": self.own.counts(batch.own)}

    def share(
        self,
        models: Any,
        batch: EitherBatch,
        counts: dict[str, Counts],
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        def own() -> jax.Array:
            return self.own.share(models, batch.own, counts["own"], spec, dropout_key)[0]

        def stored() -> jax.Array:
            student = models["student"]
            rows, count = batch.stored, counts["stored"]
            return self.stored.share(student, rows, count, spec.student, dropout_key)[0]

        return jax.lax.cond(batch.is_own, own, stored), {}

    def terms(self) -> dict[str, Objective]:
        return {}


@functools.lru_cache(maxsize=8)
def either_batch(spec: ScoredSpec) -> MakeBatch:
    """A step's batch of the kind that counts; the other one's answers are empty."""

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> EitherBatch:
        prompts, stored, is_own = data
        nobody_B = jnp.zeros(stored.rows.tokens_BL.shape[0], bool)
        nothing = AnswerBatch(stored.rows, nobody_B, nobody_B)
        own = answers_or(nothing, is_own, constants, params, prompts, step, spec)
        return EitherBatch(stored, own, is_own)

    return make


def train(
    material: offline.Material,
    method: offline.Method,
    student_S: Any,
    validation: TokenBatch,
    **options: Any,
) -> Run:
    """Trains the students of all seeds; half of the steps are on their own answers.

    The scorer is the proxy that made the labels of the method's first source.
    """
    setting, share = material.setting, method.student_share
    steps, section = setting.student_steps, setting.config.distill
    scorer = method.sources[0].labels
    assert scorer is not None
    spec = ScoredSpec(setting.student, setting.proxy, w.VOCAB_SIZE)
    run = Run.start(setting.student, setting.distill_optimizer, student_S, validation)
    stored = offline.batches_of(material, method)
    asked = [
        [padded_prompts(rows) for rows in material.rows(source.prompts, source.writer)]
        for source in method.sources
    ]
    pools, plans, owns = [], [], []
    for i, seed in enumerate(material.seeds):
        pools.append((offline.joined([prompts[i] for prompts in asked]), stored[i]))
        count = jax.tree.leaves(stored[i])[0].shape[0] - 1
        plans.append(plan_rows(count, section, seed, "distill", steps))
        owns.append([student_answers(seed, step, share) for step in range(steps)])
    both, owns_SZ = planned(pools, plans), np.array(owns)
    run.train(
        EitherObjective(
            offline.objective_of(setting, method),
            GkdObjective(0.0, 1.0, section.reduction, method.alpha),
        ),
        lambda start, stop: (*both(start, stop), owns_SZ[:, start:stop]),
        steps,
        every=section.stop.every,
        make_batch=either_batch(spec),
        constants={
            "seed": np.asarray(material.seeds, np.uint32),
            "frozen": {"student": {}, "scorer": (material.proxies[scorer], None)},
        },
        step_spec=spec,
        **options,
    )
    return run
