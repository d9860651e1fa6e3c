"""How the cost of ours grows: curves without bars."""

from __future__ import annotations

from benchmarks.speed.cases import Case, curve, dense


def growth(quick: bool) -> list[Case]:
    """An SFT step, one size at a time doubled; preference rounds; the plan of an epoch."""
    found = [
        _steps(axis, quick) for axis in (("batch",) if quick else ("batch", "length", "vocab"))
    ]
    if not quick:
        found.append(_rounds())
    counts = (1000, 10_000, 100_000) if quick else (1000, 10_000, 100_000, 1_000_000)
    for batching in ("bucket",) if quick else ("bucket", "pack"):
        task = {"work": "plan", "batching": batching, "shape": "tiny"}
        tasks = {str(count): {**task, "count": count} for count in counts}
        found.append(curve(f"growth_corpus_{batching}", tasks, repetitions=2))
    return found


def _steps(axis: str, quick: bool) -> Case:
    base, steps = {"batch": 4, "length": 128, "vocab": 8000}, 3
    tasks = {}
    for factor in (1, 2, 4) if quick else (1, 2, 4, 8):
        size = {**base, axis: base[axis] * factor}
        tasks[str(size[axis])] = {
            "work": "sft",
            "shape": "15m",
            "vocab": size["vocab"],
            "batch_size": size["batch"],
            "rows": dense(size["batch"] * steps, size["length"], size["length"] // 2),
        }
    return curve(f"growth_{axis}", tasks, repetitions=3, steps=steps)


def _rounds() -> Case:
    """One, two and four preference rounds."""
    task = {"work": "preference_round", "shape": "260k", "batch_size": 8, "lora": True}
    task["sample_batch_size"] = 16
    return curve(
        "growth_rounds",
        {str(count): {**task, "rounds": count} for count in (1, 2, 4)},
        rows={"kind": "mixed", "count": 32, "prompts": (8, 64), "answers": (8, 64)},
        repetitions=3,
    )
