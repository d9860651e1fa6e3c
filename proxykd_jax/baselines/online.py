"""The phases that methods have in common whose student answers while it trains.

Phase 0 is the look at the untrained student, phase 1 its warm-up by NLL, phase 2 the method. Each
ends with a checkpoint, and the second and the third begin with an optimizer of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import optax

from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.online_methods import OnlineSection
from proxykd_jax.data.collate import Rows
from proxykd_jax.training.batches import (
    Plan,
    count_steps,
    make_plan,
    phase_seed,
    placed_batches,
)
from proxykd_jax.training.distillation import text_lesson
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import with_fresh_optimizer
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.training.student import StudentRun


def prompt_plan(run: StudentRun, method: OnlineSection, prompts: Rows) -> tuple[Plan, int]:
    """The prompts of each step, and the number of steps."""
    distill = run.config.distill
    plan = make_plan(
        prompts.prompt_lengths - 1,
        seed=phase_seed(run.config.seed, "distill"),
        batch_size=method.rows_a_step(distill.batch_size),
        batching="bucket" if distill.batching == "pack" else distill.batching,
        max_length=run.corpus.max_length,
    )
    return plan, count_steps(plan, distill.epochs, distill.max_steps)


def warmup_optimizer(
    config: OptimizerConfig, method: OnlineSection, steps: int
) -> optax.GradientTransformation:
    """``distill.optimizer`` for so many steps of warm-up."""
    rate = method.warmup_learning_rate
    changed = {} if rate is None else {"learning_rate": rate}
    return make_optimizer(config.model_copy(update=changed), max(steps, 1))


def look_at_untrained(run: StudentRun, trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Phase 0: a validation before any training; also the checkpoint of step 0."""
    for warning in run.config.method.warnings():
        trainer.console.say(f"WARNING: {warning}")
    if trainer.progress.phase == 0:
        trainer.check_validation("untrained")
        trainer.finish_phase("untrained", dict(figures), keep=True)


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
    config, distill = run.config, run.config.distill
    if method.warms_up:
        lesson = text_lesson(config, text)
        plan = make_plan(
            lesson.rows.lengths - 1,
            seed=phase_seed(config.seed, "distill/warmup"),
            batch_size=distill.batch_size,
            batching=distill.batching,
            max_length=run.corpus.max_length,
        )
        steps = count_steps(plan, method.warmup_epochs, method.warmup_max_steps)
        start = trainer.progress.phase_step
        trainer.run_phase(
            "warmup",
            make_train_step(
                run.student.spec,
                lesson.objective,
                warmup_optimizer(distill.optimizer, method, steps),
                microbatches=distill.microbatches,
                seed=config.seed,
            ),
            placed_batches(plan, lesson.collate, start=start, stop=steps, mesh=run.mesh),
            steps,
        )
    end_warmup(run, trainer, optimizer)


def end_warmup(run: StudentRun, trainer: Trainer, optimizer: optax.GradientTransformation) -> None:
    """Ends phase 1 with the checkpoint that the method begins with; it stays for good."""
    trainer.state = with_fresh_optimizer(trainer.state, optimizer, run.mesh)
    trainer.finish_phase("warmup", {}, keep=trainer.progress.phase_step > 0)
