"""GAD: students of all seeds, each with a discriminator that learns beside it.

Objectives, optimizer and discriminator are the product's.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.miniature import world as w
from benchmarks.paper_tables.models import draw_answers
from benchmarks.paper_tables.offline import TRUTH, Material, padded_answers
from benchmarks.paper_tables.on_policy import padded_prompts, rows_of_samples
from benchmarks.paper_tables.training import MakeBatch, Run, plan_rows, planned
from proxykd_jax.baselines.gad import GadObjective, GadSpec, GadWarmupObjective, GameBatch
from proxykd_jax.baselines.gad_discriminator import adversarial_optimizer, discriminator_of
from proxykd_jax.baselines.rollouts import AnswerBatch
from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.online_methods import Gad
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.types import TokenBatch

_GAME = 1 << 30  # the two phases draw by keys of their own
REDUCTION = "token_mean"  # of the method
GROUP = Gad().samples_per_prompt


def judged_answers(
    prompts_BP: jax.Array, answers_BT: jax.Array, count_B: jax.Array, finished_B: jax.Array
) -> tuple[AnswerBatch, jax.Array]:
    """Answers whose last token is among the inputs, and where: ``game_batch``, traceable."""
    rows = rows_of_samples(prompts_BP, answers_BT, count_B)
    longer = {
        name: jnp.pad(getattr(rows, name), ((0, 0), (0, 1)))
        for name in ("tokens_BL", "labels_BL", "mask_BL", "segment_ids_BL", "positions_BL")
    }
    whole_BL = jnp.concatenate([prompts_BP, answers_BT], axis=1)
    last_B = jnp.where(count_B > 0, prompts_BP.shape[1] + count_B - 1, 0)
    at_last_BL = jnp.arange(whole_BL.shape[1])[None, :] == last_B[:, None]
    longer["tokens_BL"] = jnp.where(
        at_last_BL & (count_B > 0)[:, None], whole_BL, longer["tokens_BL"]
    )
    return AnswerBatch(rows.replace(**longer), finished_B, count_B > 0), last_B


@functools.lru_cache(maxsize=8)
def game(spec: GadSpec, temperature: float, offset: int) -> MakeBatch:
    """A step's batch: the teacher's answers, and some of the student to the same prompts."""
    settings = DrawSettings(temperature, 1.0, w.VOCAB_SIZE, (w.END,))

    def make(constants: Any, params: Any, data: Any, step: jax.Array) -> GameBatch:
        prompts, answers_BT, count_B, finished_B = data
        num, group = prompts.budgets_B.shape
        asked = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), prompts)
        state = draw_answers(
            params["student"],
            asked,
            constants["seed"],
            step + offset,
            spec.config,
            settings,
            w.MAX_ANSWER,
        )
        drawn = state.tokens_BS[:, : w.MAX_ANSWER], state.count_B, state.finished_B
        samples, last_B = judged_answers(asked.tokens_BL, *drawn)
        teacher, teacher_last_B = judged_answers(
            prompts.tokens_BL[:, 0], answers_BT, count_B, finished_B
        )
        # Given, not sampled, though there.
        teacher = teacher.replace(sampled_B=jnp.zeros_like(teacher.sampled_B))
        samples = jax.tree.map(lambda x: x.reshape(num, group, *x.shape[1:]), samples)
        return jax.lax.stop_gradient(
            GameBatch(teacher, teacher_last_B, samples, last_B.reshape(num, group))
        )

    return make


@functools.lru_cache(maxsize=8)
def _optimizer(config_json: str) -> optax.GradientTransformation:
    config = OptimizerConfig.model_validate_json(config_json)
    return adversarial_optimizer(config, 1, discriminator_learning_rate=None)


def start(material: Material, student_S: Any, validation: TokenBatch) -> Run:
    """Students, and discriminators that are copies of them."""
    setting = material.setting
    judge_S = jax.vmap(lambda params: discriminator_of(params, setting.student_model.model_dim))
    return Run.start(
        setting.student,
        _optimizer(setting.config.distill.optimizer.model_dump_json()),
        student_S,
        validation,
        {"discriminator": judge_S(student_S)},
    )


def train(material: Material, student_S: Any, validation: TokenBatch, **options: Any) -> Run:
    """A warm-up of both, then the game, whose reference is the warmed-up student."""
    run = start(material, student_S, validation)
    setting, method = material.setting, Gad()
    warmup = max(round(setting.student_steps * setting.sizes.warmup_share), 1)
    warm_up(run, material, warmup)
    run.renew_optimizer()
    objective = GadObjective(method.kl_weight, method.advantage_ddof, method.temperature, REDUCTION)
    rest = setting.student_steps - warmup
    phase(run, material, objective, rest, _GAME, reference=run.last, **options)
    return run


def warm_up(run: Run, material: Material, steps: int) -> None:
    """The student's NLL and the discriminator's loss."""
    phase(run, material, GadWarmupObjective(REDUCTION), steps, 0)


def phase(
    run: Run,
    material: Material,
    objective: GadObjective | GadWarmupObjective,
    steps: int,
    offset: int,
    *,
    reference: Any = None,
    **options: Any,
) -> None:
    """Takes the steps of a phase; without a reference it is the warm-up.

    A step has as many answers of the student as those of other methods: in the warm-up one to each
    prompt of a batch, in the game a group to each of so many prompts fewer.
    """
    setting, method = material.setting, Gad()
    name, group = ("distill/warmup", 1) if reference is None else ("distill", GROUP)
    section = setting.config.distill
    section = section.model_copy(update={"batch_size": max(section.batch_size // group, 1)})
    spec = GadSpec(setting.student, w.VOCAB_SIZE)
    pools, plans = [], []
    for seed, rows in zip(material.seeds, material.rows("distill", TRUTH), strict=True):
        asked = [padded_prompts(rows, number) for number in range(group)]
        prompts = jax.tree.map(lambda *each: np.stack(each, axis=1), *asked)
        padding = np.zeros((1, w.MAX_ANSWER), np.int32)
        answers = np.concatenate([padded_answers(rows), padding])
        count, finished = np.append(rows.lengths, 0), np.append(rows.finished, False)
        pools.append((prompts, answers, count.astype(np.int32), finished))
        plans.append(plan_rows(len(rows.rows), section, seed, name, steps))
    frozen: dict[str, Any] = {"base": {}, "reference": None if reference is None else reference}
    run.train(
        objective,
        planned(pools, plans),
        steps,
        every=section.stop.every,
        make_batch=game(spec, method.temperature, offset),
        constants={"seed": np.asarray(material.seeds, np.uint32), "frozen": frozen},
        step_spec=spec,
        **options,
    )
