"""Phases that are shared by the methods whose student answers during training.

Phase 0 is the evaluation of the untrained student, phase 1 its warm-up by NLL, phase 2 the method.
Each ends with a checkpoint. Phases 1 and 2 start with separate optimizer states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from proxykd_jax.baselines.beside_scorer import beside_scorer
from proxykd_jax.baselines.rollouts import (
    Answer,
    AnswerBatch,
    Places,
    answer_batch,
    read_places,
)
from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.config.online_methods import OnlineSection
from proxykd_jax.data.collate import Rows
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.batch_objectives import Objective
from proxykd_jax.training.batches import Joined, Plan, count_steps, planned_steps
from proxykd_jax.training.distillation import planned_figures
from proxykd_jax.training.model import Model
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState, Tree

# (student, rows of a step, step) -> one answer per row, or several per row in a sequence.
GiveAnswers = Callable[[Model, Places, int], list[Answer | None]]


def prompt_plan(run: StageRun, method: AnsweringSection, prompts: Rows) -> tuple[Plan, int]:
    """Returns the prompts of each step, and the number of steps."""
    distill = run.config.distill
    options: dict[str, Any] = {"epochs": distill.epochs, "most": distill.max_steps}
    plan = run.plan(
        prompts.prompt_lengths - 1,
        "distill",
        batch_size=method.rows_a_step(distill.batch_size),
        packs=False,
        **options,
    )
    return plan, count_steps(plan, **options)


def warmup_rate(config: OptimizerConfig, method: OnlineSection) -> OptimizerConfig:
    """Returns ``distill.optimizer`` with the learning rate of the warm-up."""
    rate = method.warmup_learning_rate
    return config if rate is None else config.model_copy(update={"learning_rate": rate})


def warmup_phase(run: StageRun, method: OnlineSection, text: Mapping[str, Rows]) -> Phase:
    """Returns the student's warm-up by NLL, with a learning rate and optimizer of its own.

    Args:
      run: the run of the stage.
      method: the method, whose keys give the length of the warm-up.
      text: rows by split; ignored if there is no warm-up.
    """
    rate = warmup_rate(run.config.distill.optimizer, method)
    phase = run.nll_phase(
        "warmup",
        Joined(text if method.warms_up else {}),
        lambda steps: make_optimizer(rate, max(steps, 1)),
        order="distill/warmup",
        epochs=method.warmup_epochs,
        most=method.warmup_max_steps,
        program="nll",
        weight=run.config.distill.nll_weight,
    )
    return phase.with_(keep=phase.steps > 0)


def answering_phase(
    run: StageRun,
    method: AnsweringSection,
    prompts: Rows,
    objective: Objective,
    answer: GiveAnswers,
    **fields: Any,
) -> Phase:
    """Returns the phase that trains on the student's answers, with the scorer loaded.

    Args:
      run, method: the stage's run and method.
      prompts: rows whose prompts are answered.
      objective: an objective that reads both models.
      answer: returns the answers to a step's prompts.
      **fields: further fields of ``Phase``.
    """
    plan, steps = prompt_plan(run, method, prompts)
    planned = planned_steps(plan)

    def make_batch(state: TrainState, frozen: Tree, step: int) -> AnswerBatch:
        answers = answer(run.model.at(state.trainable), read_places(prompts, planned(step)), step)
        return put_rows(answer_batch(answers, run.corpus.max_length), run.mesh)

    return run.phase(
        "train",
        objective,
        make_optimizer(run.config.distill.optimizer, steps),
        prompts,
        plan,
        steps,
        make_batch=make_batch,
        before=lambda state: planned_figures(prompts, steps),
        **{**beside_scorer(run), **fields},
    )
