"""GAD: each student has a discriminator that learns beside it.

Objectives, orders and discriminator are the product's; here all seeds answer at once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.paper_tables.models import draw_answers
from benchmarks.paper_tables.offline import DISTILL, Material
from benchmarks.paper_tables.on_policy import method_phases, padded_prompts, rows_of_samples
from benchmarks.paper_tables.training import MakeBatch, Run
from proxykd_jax.baselines.gad import GadSpec, GameBatch
from proxykd_jax.baselines.gad_discriminator import adversarial_optimizer, discriminator_of
from proxykd_jax.baselines.rollouts import AnswerBatch
from proxykd_jax.config.online_methods import Gad
from proxykd_jax.training.phase import Phase
from proxykd_jax.types import TokenBatch

_GAME = 1 << 30  # The number of the game's first draw; the warm-up counts from 0.


def judged_answers(
    prompts_BP: jax.Array, answers_BT: jax.Array, count_B: jax.Array, finished_B: jax.Array
) -> tuple[AnswerBatch, jax.Array]:
    """Does what ``game_batch`` does to answers, traceable: the last token of each is an input.

    Returns:
      The answers, and the position of each one's last token.
    """
    there_B = count_B > 0
    rows = rows_of_samples(prompts_BP, answers_BT, count_B, last_tokens=True)
    last_B = jnp.where(there_B, prompts_BP.shape[1] + count_B - 1, 0)
    return AnswerBatch(rows, finished_B, there_B), last_B


@functools.lru_cache(maxsize=8)
def game(spec: GadSpec, temperature: float, offset: int) -> MakeBatch:
    """A step's batch: the teacher's answers, and some of the student to the same prompts."""

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> GameBatch:
        prompts, *given = data
        num, group = prompts.budgets_B.shape
        asked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), prompts)
        drawn = draw_answers(
            params["student"], asked, constants["seed"], step + offset, spec.config, temperature
        )
        samples, last_B = judged_answers(asked.tokens_BL, *drawn)
        teacher, teacher_last_B = judged_answers(prompts.tokens_BL[:, 0], *given)
        teacher = dataclasses.replace(teacher, sampled_B=jnp.zeros_like(teacher.sampled_B))
        samples = jax.tree.map(lambda x: x.reshape(num, group, *x.shape[1:]), samples)
        return jax.lax.stop_gradient(
            GameBatch(teacher, teacher_last_B, samples, last_B.reshape(num, group))
        )

    return make


def phases_of(material: Material, group: int) -> list[Sequence[Phase]]:
    """Warm-up and game, with ``group`` answers to each prompt and so many prompts fewer a step."""
    setting = material.setting
    warmup, size = setting.warmup_steps, setting.config.distill.batch_size
    return method_phases(
        material,
        Gad(warmup_epochs=setting.config.distill.epochs, warmup_max_steps=warmup),
        batch_size=max(size // group, 1),
        max_steps=setting.student_steps - warmup,
    )


def start(material: Material, student_S: Any, validation: TokenBatch) -> Run:
    """Starts the students, and discriminators that are copies of them."""
    section = material.setting.config.distill
    width = material.setting.student_model.model_dim
    judge_S = jax.vmap(lambda params: discriminator_of(params, width))(student_S)
    return Run.start(
        phases_of(material, 1)[0][0],
        section,
        {"student": student_S, "discriminator": judge_S},
        validation,
        adversarial_optimizer(section.optimizer, 1, discriminator_learning_rate=None),
    )


def train(material: Material, student_S: Any, validation: TokenBatch, **options: Any) -> Run:
    """Takes a warm-up of both, then the game, whose reference is the warmed-up student."""
    run = start(material, student_S, validation)
    warm_up(run, material)
    run.renew_optimizer()
    group = Gad().samples_per_prompt
    phases = phases_of(material, group)[1]
    _take(run, material, phases, group, _GAME, reference=run.last, **options)
    return run


def warm_up(run: Run, material: Material) -> None:
    """Takes the steps on the student's NLL and the discriminator's loss."""
    _take(run, material, phases_of(material, 1)[0], 1, 0)


def _take(
    run: Run,
    material: Material,
    phases: Sequence[Phase],
    group: int,
    offset: int,
    *,
    reference: Any = None,
    **options: Any,
) -> None:
    """Takes the steps of a phase; the warm-up has no reference."""
    pools = []
    for rows in material.rows(DISTILL):
        asked = [padded_prompts(rows, number) for number in range(group)]
        prompts = jax.tree.map(lambda *each: np.stack(each, axis=1), *asked)
        given = (rows.answers_NT, rows.answer_lengths, rows.finished)
        pools.append((prompts, *(np.concatenate([x, np.zeros_like(x[:1])]) for x in given)))
    spec = phases[0].spec
    assert isinstance(spec, GadSpec)
    run.take(
        phases,
        pools=pools,
        make_batch=game(spec, Gad().temperature, offset),
        constants={
            "seed": np.asarray(material.seeds, np.uint32),
            "frozen": {"base": {}, "reference": reference},
        },
        **options,
    )
