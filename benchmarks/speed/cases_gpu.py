"""The cases of one GPU: 1B and 7B at length 1024, frozen bfloat16 weights, LoRA."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.cases import OURS, TORCH, Case, dense, of_ours, score_over_forward, with_peers

_LENGTH = 1024
_STEPS = 6
# The rows of a step; a pair counts as two. Both tools keep their models, so 80 GB must hold both.
_BATCH = {"1b": 8, "7b": 4}


def cases(quick: bool) -> list[Case]:
    """All cases; with ``quick`` only those of the smaller shape."""
    shapes = ("1b",) if quick else ("7b", "1b")
    scored = {"rows": _dense(64), "repetitions": 5, "steps": 2}
    return [
        _peak(),
        *(_step(work, shape) for shape in shapes for work in ("sft", "dpo", "distill")),
        score_over_forward({"shape": "1b", "batch_size": 32}, 1.15, **scored),
        _sampling("1b"),
    ]


def _dense(count: int) -> dict[str, Any]:
    return dense(count, _LENGTH, _LENGTH // 2)


def _peak() -> Case:
    """The peak of bfloat16 products, to which the utilisation in the other cases relates."""
    task = {"work": "peak", "shape": "1b", "dtype": "bfloat16", "sizes": [4096, 8192, 16_384]}
    return of_ours("peak", {OURS: task}, repetitions=1)


def _step(work: str, shape: str) -> Case:
    """Several steps in a run, so that a tool may prepare one while another is computed."""
    batch = _BATCH[shape] // 2 if work == "dpo" else _BATCH[shape]
    return with_peers(
        f"{work}_dense_{shape}",
        {"work": work, "shape": shape, "batch_size": batch, "lora": True},
        {TORCH: 1.0},
        compiled=True,
        rows=_dense(_STEPS * batch),
        repetitions=5,
        steps=_STEPS,
        tolerance=5e-2,  # The models compute in bfloat16.
    )


def _sampling(shape: str) -> Case:
    task = {"shape": shape, "batch_sizes": [128], "greedy_rows": 8, "greedy_tokens": 8}
    return with_peers(
        f"sampling_{shape}",
        {"work": "sample", **task},
        {TORCH: 3.0},
        compiled=False,
        rows={"kind": "mixed", "count": 128, "prompts": (32, 512), "answers": (16, 256)},
        repetitions=2,
    )
