"""How the cost of ours grows; no bars, only curves."""

from __future__ import annotations

from benchmarks.speed.cases import OURS, Case, Comparison, Entry, dense


def growth(quick: bool) -> list[Case]:
    """How an SFT step grows, one size at a time doubled; and the plan of an epoch."""
    base = {"batch": 4, "length": 128, "vocab": 8000}
    steps = 3
    factors = (1, 2, 4) if quick else (1, 2, 4, 8)
    found = []
    for axis in ("batch",) if quick else ("batch", "length", "vocab"):
        sizes = []
        for factor in factors:
            size = {**base, axis: base[axis] * factor}
            sizes.append((str(size[axis]), size))
        found.append(
            Case(
                name=f"growth_{axis}",
                entries=tuple(
                    Entry(
                        label,
                        OURS,
                        {
                            "work": "sft",
                            "shape": "15m",
                            "vocab": size["vocab"],
                            "batch_size": size["batch"],
                            "rows": dense(
                                size["batch"] * steps, size["length"], size["length"] // 2
                            ),
                        },
                    )
                    for label, size in sizes
                ),
                comparisons=tuple(
                    Comparison(f"growth_{axis}/{label}", label, sizes[0][0], lower_is_better=True)
                    for label, _ in sizes[1:]
                ),
                repetitions=3,
                steps=steps,
            )
        )
    if not quick:
        found.append(_growth_rounds())
    counts = (1000, 10_000, 100_000) if quick else (1000, 10_000, 100_000, 1_000_000)
    for batching in ("bucket",) if quick else ("bucket", "pack"):
        labels = [str(count) for count in counts]
        found.append(
            Case(
                name=f"growth_corpus_{batching}",
                entries=tuple(
                    Entry(
                        str(count),
                        OURS,
                        {"work": "plan", "count": count, "batching": batching, "shape": "tiny"},
                    )
                    for count in counts
                ),
                comparisons=tuple(
                    Comparison(
                        f"growth_corpus_{batching}/{label}", label, labels[0], lower_is_better=True
                    )
                    for label in labels[1:]
                ),
                repetitions=2,
            )
        )
    return found


def _growth_rounds() -> Case:
    """One, two and four preference rounds."""
    task = {"work": "preference_round", "shape": "260k", "batch_size": 8, "lora": True}
    counts = (1, 2, 4)
    return Case(
        name="growth_rounds",
        entries=tuple(
            Entry(str(count), OURS, {**task, "sample_batch_size": 16, "rounds": count})
            for count in counts
        ),
        comparisons=tuple(
            Comparison(f"growth_rounds/{count}", str(count), "1", lower_is_better=True)
            for count in counts[1:]
        ),
        rows={"kind": "mixed", "count": 32, "prompts": (8, 64), "answers": (8, 64)},
        repetitions=3,
    )
