"""Training steps of this library, by its public step function and its own plans of batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.speed.ours_models import Memory, device_peak, load, token_rows
from benchmarks.speed.protocol import Program, best_of
from benchmarks.speed.rows import TOP_K, Rows
from proxykd_jax.config import OptimizerConfig, PreferenceConfig
from proxykd_jax.data.collate import collate_rows
from proxykd_jax.data.order import PlannedBatch, default_buckets, plan_epoch
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.cost import step_flops
from proxykd_jax.training.batches import Joined, distill_collate, token_collate
from proxykd_jax.training.objectives import AlignObjective, DistillObjective, NllObjective
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import ModelSpec, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import PairBatch

BETA = 0.1
ALPHA = 1.0
LEARNING_RATE = 1e-5

Collate = Callable[[PlannedBatch], Any]


def objective_of(work: str) -> Any:
    """What a step of this work minimises; token means, so that every tool has the same sum."""
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


def collate_of(work: str, rows: Rows) -> tuple[Collate, np.ndarray]:
    """(batches of this work, positions that each example takes)."""
    chosen = token_rows(rows)
    if work == "sft":
        return token_collate(Memory(chosen)), rows.lengths - 1
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
            Joined({"distill": Memory(chosen)}),
            {"distill": lambda wanted, ids: [labels[index] for index in wanted]},
            {"distill": rows.weights},
            ("distill",),
            top_k=TOP_K,
        )
        return collate, rows.lengths - 1
    rejected = token_rows(rows, rejected=True)

    def pairs(planned: PlannedBatch) -> PairBatch:
        places = [row[0] if row else None for row in planned.rows]
        size = (planned.length, planned.num_segments, len(planned.rows))

        def numbers(values: np.ndarray) -> np.ndarray:
            return np.array([0.0 if p is None else values[p] for p in places], np.float32)

        return PairBatch(
            chosen=collate_rows([[] if p is None else [chosen[p]] for p in places], *size),
            rejected=collate_rows([[] if p is None else [rejected[p]] for p in places], *size),
            reference_chosen_B=numbers(rows.reference_chosen),
            reference_rejected_B=numbers(rows.reference_rejected),
            pair_mask_B=np.array([p is not None for p in places]),
        )

    return pairs, np.maximum(rows.lengths, rows.rejected_lengths) - 1


def first_rows(batch_size: int, positions: np.ndarray, buckets: tuple[int, ...]) -> PlannedBatch:
    """The first so many rows in their order: the batch that all tools' results are compared on."""
    longest = int(positions[:batch_size].max())
    length = next(bucket for bucket in buckets if bucket >= longest)
    return PlannedBatch(tuple((index,) for index in range(batch_size)), length)


class Trainer:
    """A model in training.

    Attributes:
      spec, config: of the model.
      state: changes with every step.
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
        """One step; returns its metrics, not waited for."""
        step = make_train_step(
            self.spec,
            objective_of(work),
            self._optimizer,
            microbatches=self._microbatches,
            seed=0,
        )
        self.state, metrics = step(self.state, self.frozen, batch)
        return metrics


def epoch(
    positions: np.ndarray, task: dict[str, Any], batching: Any, buckets: tuple[int, ...]
) -> list[PlannedBatch]:
    """The batches of the first epoch."""
    plan = plan_epoch(
        positions,
        seed=0,
        epoch=0,
        batch_size=task["batch_size"],
        batching=batching,
        buckets=buckets,
    )
    return list(plan)


def training(task: dict[str, Any]) -> Program:
    """An epoch of steps over the task's rows; ``batchings`` are tried and the fastest is taken."""
    work = task["work"]
    rows = Rows.load(task["rows"])
    trainer = Trainer(task)
    collate, positions = collate_of(work, rows)
    buckets = default_buckets(int(positions.max()) + 1)
    checked = trainer.step(work, collate(first_rows(task["batch_size"], positions, buckets)))
    results = {name: float(checked[name]) for name in ("loss", "grad_norm")}

    def way(batching: str) -> Callable[[], None]:
        planned = epoch(positions, task, batching, buckets)

        def run() -> None:
            for batch in planned:
                metrics = trainer.step(work, collate(batch))
            jax.block_until_ready((trainer.state, metrics))

        return run

    batchings = task.get("batchings", ["pad"])
    if work.startswith("dpo"):
        batchings = [one for one in batchings if one != "pack"]  # pairs are never packed
    run, settings = best_of({f"batching={one}": way(one) for one in batchings})
    return Program(
        run=run,
        results=results,
        settings=settings,
        units=float(rows.answer_tokens),
        flops=_flops(trainer.config, task, work, rows),
        peak=device_peak(),
    )


def _flops(config: ModelConfig, task: dict[str, Any], work: str, rows: Rows) -> float:
    """Counted for rows of one length; what remat computes again is not model work."""
    length = int(rows.lengths.max()) if len(set(rows.lengths.tolist())) == 1 else 0
    count = len(rows) * (2 if work.startswith("dpo") else 1)
    return step_flops(config, count, length, full=not task.get("lora"), remat="none")


def planning(task: dict[str, Any]) -> Program:
    """The plan of an epoch over ``count`` rows, without their tokens: what grows with a corpus."""
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
        for _ in plan[: 100 if len(plan) > 100 else len(plan)]:
            pass

    return Program(run=run, units=float(task["count"]))
