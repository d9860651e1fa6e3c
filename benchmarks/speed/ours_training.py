"""Training steps of this library, by its step function and its plans of batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.speed.ours_models import device_peak, load, token_rows
from benchmarks.speed.protocol import Program, Run, best_of
from benchmarks.speed.rows import TOP_K, Rows
from proxykd_jax.config import OptimizerConfig, PreferenceConfig
from proxykd_jax.data.collate import RowsInMemory
from proxykd_jax.data.order import PlannedBatch, default_buckets, plan_epoch
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.operations import step_flops
from proxykd_jax.training.batch_objectives import AlignObjective, DistillObjective, NllObjective
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    answer_positions,
    distill_collate,
    make_plan,
    token_collate,
)
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.pairs import collate_pairs, pair_answers
from proxykd_jax.training.state import ModelSpec, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import Pairs

BETA = 0.1
ALPHA = 1.0
LEARNING_RATE = 1e-5
_STEPS = 1000  # The timed epoch has the batches of a run of so many steps.

Collate = Callable[[PlannedBatch], Any]


def objective_of(work: str) -> Any:
    """The objective of a work, with token means, so that every tool computes the same sum."""
    if work == "sft":
        return NllObjective("token_mean")
    if work == "distill":
        return DistillObjective(
            alpha=ALPHA, nll_weight=1.0, tail="bucket", reduction="token_mean", temperature=1.0
        )
    preference = PreferenceConfig(loss="dpo", beta=BETA)
    return AlignObjective(
        preference,
        "token_mean",
        nll_weight=0.0 if work == "dpo_plain" else 1.0,
        preference_weight=1.0,
    )


@dataclass(frozen=True)
class Examples:
    """The examples of a work, from which plans and batches are made.

    Attributes:
      collate: turns a planned batch into the arrays of a step.
      positions: number of positions that each example takes.
      answers: number of these whose label is a token of an answer.
    """

    collate: Collate
    positions: np.ndarray
    answers: np.ndarray

    @property
    def max_length(self) -> int:
        """The number of tokens of the longest example."""
        return int(self.positions.max()) + 1

    def first(self, batch_size: int) -> PlannedBatch:
        """The batch of the first rows, on which the results of all tools are compared."""
        longest = int(self.positions[:batch_size].max())
        length = next(
            bucket for bucket in default_buckets(self.max_length, _STEPS) if bucket >= longest
        )
        rows = tuple((index,) for index in range(batch_size))
        answers = int(self.answers[:batch_size].sum())
        return PlannedBatch(rows, length, answers=answers, together=batch_size)

    def plan(self, batch_size: int, batching: Any) -> Plan:
        """The batches of a training of many epochs."""
        return make_plan(
            self.positions,
            seed=0,
            batch_size=batch_size,
            batching=batching,
            max_length=self.max_length,
            answers=self.answers,
            together=batch_size,
            epochs=_STEPS,
            most=_STEPS,
        )

    def epoch(self, batch_size: int, batching: Any) -> list[PlannedBatch]:
        """The batches of its first epoch."""
        return list(self.plan(batch_size, batching)(0))


def examples_of(work: str, rows: Rows, *, share_prompt: bool = True) -> Examples:
    """The examples of a work. Those of DPO share a prompt, or do not."""
    chosen = token_rows(rows)
    teacher = RowsInMemory(chosen)
    answers = answer_positions(teacher)
    if work == "sft":
        return Examples(token_collate(teacher), rows.lengths - 1, answers)
    if work == "distill":
        labels = [
            SoftLabels(
                row.row_id,
                rows.topk_ids[index],
                rows.topk_logps[index],
                np.zeros(len(row.answer), np.float32),
                rows.tails(index),
            )
            for index, row in enumerate(chosen)
        ]
        collate = distill_collate(
            Joined({"distill": teacher}),
            {"distill": lambda wanted, ids: [labels[index] for index in wanted]},
            {"distill": rows.weights},
            ("distill",),
            top_k=TOP_K,
        )
        return Examples(collate, rows.lengths - 1, answers)
    rejected = token_rows(rows, rejected=True)

    references = (rows.reference_chosen, rows.reference_rejected)

    def pairs(planned: PlannedBatch) -> Pairs:
        both = [(chosen[row[0]], rejected[row[0]]) for row in planned.rows if row]
        return collate_pairs(both, planned, references, share_prompt=share_prompt)

    own = answer_positions(RowsInMemory(rejected))
    inside = pair_answers(answers, own, share_prompt=share_prompt)
    return Examples(pairs, rows.lengths - 1 - answers + inside, inside)


class Trainer:
    """A model in training.

    Attributes:
      spec, config: static halves of the model.
      state: the state, which changes with every step.
      frozen: the base of an adapter, else None.
    """

    def __init__(self, task: dict[str, Any]) -> None:
        self.config, params, adapter = load(task)
        lora = adapter is not None
        dtype = str(jax.tree.leaves(params)[0].dtype)
        remat = task.get("remat", "none")
        self.spec = ModelSpec(self.config, "lora" if lora else "full", dtype, remat)
        self._optimizer = make_optimizer(
            OptimizerConfig(learning_rate=LEARNING_RATE, clip_norm=None), 1
        )
        self.frozen = params if lora else None
        self.state = init_state(adapter if lora else params, self._optimizer)
        self._microbatches = task.get("microbatches", 1)

    def step(self, work: str, batch: Any) -> Any:
        """Starts a step and returns its metrics."""
        step = make_train_step(
            self.spec,
            objective_of(work),
            self._optimizer,
            microbatches=self._microbatches,
            seed=0,
        )
        self.state, metrics = step(self.state, self.frozen, batch)
        return metrics

    def epoch(self, work: str, examples: Examples, planned: Sequence[PlannedBatch]) -> None:
        """Takes a step on each batch and waits for the last."""
        for batch in planned:
            metrics = self.step(work, examples.collate(batch))
        jax.block_until_ready((self.state, metrics))


def training(task: dict[str, Any]) -> Program:
    """Takes an epoch of steps over the task's rows.

    It tries the task's ``batchings``, and for pairs prompts that are shared or not, and takes the
    fastest way.
    """
    work = task["work"]
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    pairs = work.startswith("dpo")
    shared = task.get("share_prompt", [True, False]) if pairs else [True]
    examples = examples_of(work, rows, share_prompt=shared[0])
    checked = trainer.step(work, examples.collate(examples.first(task["batch_size"])))
    results = {name: float(checked[name]) for name in ("loss", "grad_norm")}

    flops: dict[Run, float] = {}

    def way(batching: str, share_prompt: bool) -> Callable[[], None]:
        examples = examples_of(work, rows, share_prompt=share_prompt)
        planned = examples.epoch(task["batch_size"], batching)

        def run() -> None:
            trainer.epoch(work, examples, planned)

        full = trainer.frozen is None
        shared = pairs and share_prompt
        flops[run] = _flops(trainer.config, rows, pairs=pairs, shared=shared, full=full)
        return run

    ways: dict[str, Run] = {}
    for one in task.get("batchings", ["pad"]):
        if pairs and one != "pack":  # Pairs are never packed.
            ways |= {f"batching={one}, share_prompt={both}": way(one, both) for both in shared}
        elif not pairs:
            ways[f"batching={one}"] = way(one, True)
    run, settings = best_of(ways)
    return Program(
        run=run,
        results=results,
        settings=settings,
        units=float(rows.answer_tokens),
        flops=flops[run],
        peak=device_peak(),
    )


def _flops(config: ModelConfig, rows: Rows, *, pairs: bool, shared: bool, full: bool) -> float:
    """The FLOPs of an epoch on rows of one length, without what remat computes again; 0 for rows of
    mixed lengths."""
    if len(set(rows.lengths.tolist())) > 1:
        return 0.0
    count, length = len(rows), int(rows.lengths.max())
    if shared:
        length += length - int(rows.prompt_lengths.max())  # Both answers follow one prompt.
    elif pairs:
        count *= 2
    return step_flops(config, count, length, full=full, remat="none")


def planning(task: dict[str, Any]) -> Program:
    """Plans an epoch over ``count`` rows without tokens: the work that grows with a corpus."""
    lengths = np.random.default_rng(0).integers(30, 500, task["count"])

    def run() -> None:
        plan = plan_epoch(
            lengths,
            seed=0,
            epoch=0,
            batch_size=32,
            batching=task["batching"],
            buckets=default_buckets(512),
        )
        for _ in plan[:100]:
            pass

    return Program(run=run, units=float(task["count"]))
