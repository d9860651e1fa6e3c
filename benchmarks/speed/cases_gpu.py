"""The cases of one GPU: 1B and 7B at length 1024, frozen bfloat16 weights, LoRA."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.cases import (
    OURS,
    TORCH,
    Case,
    Entry,
    against_peers,
    dense,
    peers,
    score_over_forward,
)

_LENGTH = 1024
_STEPS = 6
# Rows of a step; a pair counts as two. Both tools keep their models, so 80 GB hold both.
_BATCH = {"1b": 8, "7b": 4}


def cases(quick: bool) -> list[Case]:
    """All of them; with ``quick`` the smaller shape alone."""
    shapes = ("1b",) if quick else ("7b", "1b")
    return [
        _peak(),
        *(_step(work, shape) for shape in shapes for work in ("sft", "dpo", "distill")),
        score_over_forward({"shape": "1b", "batch_size": 32}, _dense(64), 1.15, 5, 2),
        _sampling("1b"),
    ]


def _dense(count: int) -> dict[str, Any]:
    return dense(count, _LENGTH, _LENGTH // 2)


def _peak() -> Case:
    """Of bfloat16 products; utilisation in the other cases is of what it finds."""
    task = {"work": "peak", "shape": "1b", "dtype": "bfloat16", "sizes": [4096, 8192, 16_384]}
    entry = Entry(OURS, OURS, task)
    return Case(name="peak", entries=(entry,), comparisons=(), repetitions=1)


def _step(work: str, shape: str) -> Case:
    """Several steps in a run, so that a tool may prepare one while another is computed."""
    name = f"{work}_dense_{shape}"
    batch = _BATCH[shape] // 2 if work == "dpo" else _BATCH[shape]
    task = {"shape": shape, "batch_size": batch, "lora": True}
    return Case(
        name=name,
        entries=peers(work, task, (TORCH,), compiled=True),
        comparisons=against_peers(name, {TORCH: 1.0}),
        rows=_dense(_STEPS * batch),
        repetitions=5,
        steps=_STEPS,
        same=(OURS, TORCH),
        tolerance=5e-2,  # in bfloat16
    )


def _sampling(shape: str) -> Case:
    name = f"sampling_{shape}"
    task = {"shape": shape, "batch_sizes": [128], "greedy_rows": 8, "greedy_tokens": 8}
    return Case(
        name=name,
        entries=peers("sample", task, (TORCH,), compiled=False),
        comparisons=against_peers(name, {TORCH: 3.0}),
        rows={"kind": "mixed", "count": 128, "prompts": (32, 512), "answers": (16, 256)},
        repetitions=2,
        same=(OURS, TORCH),
    )
