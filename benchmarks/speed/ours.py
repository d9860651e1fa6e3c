"""The worker of this library: ``python -m benchmarks.speed.ours``. See ``protocol``."""

from __future__ import annotations

from typing import Any

import jax

from benchmarks.speed import floor, ours_inference, ours_models, ours_round, ours_training
from benchmarks.speed.protocol import Program, serve


def make(task: dict[str, Any]) -> Program:
    """Writes the model of a shape; there is nothing to run."""
    device = {"backend": jax.default_backend(), "device": jax.devices()[0].device_kind}
    extra = {**ours_models.make(task), **device}
    return Program(run=lambda: None, extra=extra)


WORKS = {
    "make": make,
    "sft": ours_training.training,
    "dpo": ours_training.training,
    "dpo_plain": ours_training.training,
    "distill": ours_training.training,
    "score": ours_inference.scoring,
    "forward": ours_inference.gold_forward,
    "sample": ours_inference.sampling,
    "sft_round": ours_round.sft_round,
    "preference_round": ours_round.preference_round,
    "plan": ours_training.planning,
    "products": floor.products,
    "peak": floor.peak,
}


def prepare(task: dict[str, Any]) -> Program:
    """The program of one task."""
    return WORKS[task["work"]](task)


if __name__ == "__main__":
    raise SystemExit(serve(prepare))
