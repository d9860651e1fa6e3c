"""The phases that methods have in common whose student answers while it trains.

Phase 0 is the look at the untrained student, phase 1 its warm-up by NLL, phase 2 the method. Each
ends with a checkpoint, and the second and the third begin with an optimizer of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import optax

from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.config.online_methods import OnlineSection
from proxykd_jax.data.collate import Rows
from proxykd_jax.training.batches import (
    Plan,
    answer_positions,
    count_steps,
)
from proxykd_jax.training.distillation import stored_course, text_lesson
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import with_fresh_optimizer
from proxykd_jax.training.student import StudentRun


def prompt_plan(run: StudentRun, method: AnsweringSection, prompts: Rows) -> tuple[Plan, int]:
    """The prompts of each step, and the number of steps."""
    distill = run.config.distill
    plan = run.plan(
        prompts.prompt_lengths - 1,
        "distill",
        batch_size=method.rows_a_step(distill.batch_size),
        packs=False,
    )
    return plan, count_steps(plan, distill.epochs, distill.max_steps)


def warmup_rate(config: OptimizerConfig, method: OnlineSection) -> OptimizerConfig:
    """``distill.optimizer`` with the learning rate of the warm-up."""
    rate = method.warmup_learning_rate
    return config if rate is None else config.model_copy(update={"learning_rate": rate})


def warm_up(
    run: StudentRun,
    method: OnlineSection,
    trainer: Trainer,
    text: Mapping[str, Rows],
    optimizer: optax.GradientTransformation,
) -> None:
    """Phase 1: the student's NLL on ``text``.

    Args:
      run, method: whose keys say how long.
      trainer: of the stage.
      text: rows by split; not looked at where there is no warm-up.
      optimizer: of the phase after it.
    """
    if trainer.progress.phase != 1:
        return
    if method.warms_up:
        lesson = text_lesson(run.config, text)
        answers = answer_positions(lesson.rows)
        plan = run.plan(lesson.rows.lengths - 1, "distill/warmup", answers=answers)
        steps = count_steps(plan, method.warmup_epochs, method.warmup_max_steps)
        warming = make_optimizer(warmup_rate(run.config.distill.optimizer, method), max(steps, 1))
        stored_course(run, lesson, trainer, plan, steps, warming).take(trainer, "warmup", steps)
    end_warmup(run, trainer, optimizer)


def end_warmup(run: StudentRun, trainer: Trainer, optimizer: optax.GradientTransformation) -> None:
    """Ends phase 1 with the checkpoint that the method begins with; it stays for good."""
    trainer.state = with_fresh_optimizer(trainer.state, optimizer, run.mesh)
    trainer.finish_phase("warmup", {}, keep=trainer.progress.phase_step > 0)
