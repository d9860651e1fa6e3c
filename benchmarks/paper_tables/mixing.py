"""Proxy-KD whose student also learns on its own answers: ``baselines.mixing`` of all seeds.

Seeds differ in the kind of a step, so the kind is data, and the other kind is not computed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from benchmarks.paper_tables import offline
from benchmarks.paper_tables.on_policy import (
    answers_or,
    beside_scorer,
    padded_prompts,
    who_answers,
)
from benchmarks.paper_tables.seeds import Rows
from benchmarks.paper_tables.training import MakeBatch, Run, every_row
from proxykd_jax.baselines.beside_scorer import ScoredSpec
from proxykd_jax.baselines.mixing import MixedObjective
from proxykd_jax.baselines.rollouts import AnswerBatch
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
    """The product's objective where the kind of a step is data."""

    mixed: MixedObjective

    def counts(self, batch: EitherBatch) -> dict[str, Counts]:
        return {kind: self.mixed.counts(getattr(batch, kind)) for kind in ("stored", "own")}

    def share(
        self,
        models: dict[str, Any],
        batch: EitherBatch,
        counts: dict[str, Counts],
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        def loss_on(kind: str) -> jax.Array:
            part = (getattr(batch, kind), counts[kind])
            return self.mixed.share(models, *part, spec, dropout_key)[0]

        own, stored = (functools.partial(loss_on, kind) for kind in ("own", "stored"))
        return jax.lax.cond(batch.is_own, own, stored), {}

    def terms(self) -> dict[str, Objective]:
        return {}


@functools.lru_cache(maxsize=8)
def either_batch(spec: ScoredSpec) -> MakeBatch:
    """A step's batch of the kind that counts; the other kind's answers are empty."""

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> EitherBatch:
        (prompts, stored), is_own = data
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
    """Trains the students of all seeds on stored rows and on their own answers.

    The scorer is the proxy that made the labels of the method's first source.
    """
    phases, scorer = offline.phases_of(material, method), method.sources[0].labels
    assert scorer is not None
    pools, either = [], []
    for phase in phases:
        objective, spec, collate = phase.objective, phase.spec, phase.collate
        assert isinstance(objective, MixedObjective) and isinstance(spec, ScoredSpec) and collate
        count = len(phase.rows)
        prompts = padded_prompts(Rows(phase.rows.read(range(count))))
        pools.append((prompts, collate(every_row(count))))
        either.append(phase.with_(objective=EitherObjective(objective)))
    run = Run.start(phases[0], material.setting.config.distill, student_S, validation)
    run.take(
        either,
        pools=pools,
        beside=[who_answers(material, method.student_share)],
        make_batch=either_batch(spec),
        constants=beside_scorer(material, scorer),
        **options,
    )
    return run
