"""The cases of one GPU: 1B and 7B at length 1024, frozen bfloat16 weights, LoRA."""

from __future__ import annotations

from benchmarks.speed.cases import OURS, TORCH, Case, Entry, against_peers, peers


def cases(quick: bool) -> list[Case]:
    """All of them; with ``quick`` the smaller shape alone."""
    length = 1024
    found = [
        Case(
            name="peak",
            entries=(
                Entry(
                    OURS,
                    OURS,
                    {"work": "peak", "shape": "1b", "dtype": "bfloat16", "sizes": [4096, 8192]},
                ),
            ),
            comparisons=(),
            repetitions=1,
        )
    ]
    for shape, batch in (("1b", 8),) if quick else (("1b", 8), ("7b", 4)):
        rows = {"kind": "dense", "count": batch, "length": length, "prompt": length // 2}
        task = {"shape": shape, "batch_size": batch, "lora": True}
        for work in ("sft", "dpo", "distill"):
            name = f"{work}_dense_{shape}"
            found.append(
                Case(
                    name=name,
                    entries=peers(work, task, (TORCH,), compiled=True),
                    comparisons=against_peers(name, {TORCH: 1.0}),
                    rows=rows,
                    repetitions=5,
                    same=(OURS, TORCH),
                    tolerance=5e-2,
                )
            )
    return found
