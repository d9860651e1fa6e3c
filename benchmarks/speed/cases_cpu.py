"""The cases of two CPU cores, float32."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.cases import (
    OURS,
    TORCH,
    TUNIX,
    Case,
    Comparison,
    Entry,
    against_peers,
    dense,
    peers,
    score_over_forward,
)
from benchmarks.speed.cases_growth import growth

# (bar against PyTorch, bar against Tunix) for equal work on equal dense batches.
_DENSE = {TORCH: 1.0, TUNIX: 1.2}
_CORPUS = 1.8
# Steps of a turn: a second or more. A process that has waited for its turn pays in its first step
# for memory that the system took back meanwhile, which no training does.
_STEPS = {"260k": 8, "15m": 3, "100m": 2}


def cases(quick: bool) -> list[Case]:
    """All of them, in the order in which they run; ``quick`` leaves some out."""
    found: list[Case] = []
    for shape in ("15m",) if quick else ("260k", "15m", "100m"):
        found += _dense(shape, quick)
    found += _shared_prompt(quick)
    found += _own_ratios(quick)
    found += _corpora(quick)
    found += [_sampling(quick), _rounds(quick)]
    found += growth(quick)
    return [*found, *_startup()]


def _dense(shape: str, quick: bool) -> list[Case]:
    """Equal rows of one length, half of it prompt."""
    batch, length = {"260k": (16, 256), "15m": (8, 256), "100m": (4, 256)}[shape]
    if quick:
        batch, length = batch // 2, length // 2
    rows = dense(batch * _STEPS[shape], length, length // 2)
    task = {"shape": shape, "batch_size": batch}
    repetitions = {"260k": 9, "15m": 7, "100m": 3}[shape]
    found = []
    for work, lora, tools in (
        ("sft", False, (TORCH, TUNIX)),
        ("dpo", True, (TORCH,)),
        # Tunix has no NLL beside the preference.
        ("dpo_plain", True, (TORCH, TUNIX)),
        ("distill", False, (TORCH, TUNIX)),
        ("sft_lora", True, (TORCH, TUNIX)),
    ):
        if work in ("dpo_plain", "sft_lora") and (quick or shape != "15m"):
            continue
        if shape == "100m":
            tools = (TORCH,)
        name = f"{work}_dense_{shape}"
        compiled = not quick and shape != "100m"
        found.append(
            Case(
                name=name,
                entries=peers(work.removesuffix("_lora"), {**task, "lora": lora}, tools, compiled),
                comparisons=against_peers(name, {tool: _DENSE[tool] for tool in tools}),
                rows=rows,
                repetitions=min(repetitions, 3) if quick else repetitions,
                steps=_STEPS[shape],
                same=(OURS, *tools),
            )
        )
    return found


def _shared_prompt(quick: bool) -> list[Case]:
    """DPO on pairs whose prompt is half of the row that both answers share: computed once or twice.

    The same with prompts as long as an answer, where arithmetic allows 4/3 without a vocabulary.
    """
    found = []
    for shape, batch, turns in (("15m", 8, 7),) if quick else (("15m", 8, 7), ("100m", 4, 3)):
        for of_row, length, prompt in (("half", 192, 128), ("third", 192, 96)):
            name = f"dpo_shared_prompt_{of_row}_{shape}"
            task = {"work": "dpo", "shape": shape, "batch_size": batch, "lora": True}
            entries = {"shared": [True], "unshared": [False]}
            found.append(
                Case(
                    name=name,
                    entries=tuple(
                        Entry(label, OURS, {"share_prompt": share, **task})
                        for label, share in entries.items()
                    ),
                    comparisons=(
                        Comparison(name, *entries, bar=1.3 if of_row == "half" else None),
                    ),
                    rows=dense(batch * _STEPS[shape], length, prompt),
                    repetitions=3 if quick else turns,
                    steps=_STEPS[shape],
                    same=tuple(entries),
                )
            )
    return found


def _own_ratios(quick: bool) -> list[Case]:
    """What of ours costs how much more than another part of ours."""
    batch, length = (4, 128) if quick else (8, 256)
    steps = _STEPS["15m"]
    half = dense(batch * steps, length, length // 2)
    # Every token is an answer's: whether prompts are projected onto the vocabulary does not matter.
    answers = dense(batch * steps, length + 1, 1)
    task: dict[str, Any] = {"shape": "15m", "batch_size": batch}
    turns = 3 if quick else 7
    found = [
        Case(
            name="floor_15m",
            entries=(
                Entry("step", OURS, {"work": "sft", **task}),
                Entry(
                    "products", OURS, {"work": "products", "length": length, "steps": steps, **task}
                ),
            ),
            comparisons=(Comparison("floor_15m", "step", "products", measure="cpu", bar=0.75),),
            rows=answers,
            repetitions=turns,
            steps=steps,
        ),
        Case(
            name="distill_over_sft_15m",
            entries=(
                Entry("distill", OURS, {"work": "distill", **task}),
                Entry("sft", OURS, {"work": "sft", **task}),
            ),
            comparisons=(
                Comparison("distill_over_sft_15m", "distill", "sft", bar=1.1, lower_is_better=True),
                Comparison(
                    "memory_distill_over_sft_15m",
                    "distill",
                    "sft",
                    measure="peak",
                    bar=1.1,
                    lower_is_better=True,
                ),
            ),
            rows=half,
            repetitions=turns,
            steps=steps,
        ),
    ]
    for shape, bar in (("15m", 1.35),) if quick else (("15m", 1.35), ("100m", 1.15)):
        found.append(score_over_forward({**task, "shape": shape}, half, bar, turns, steps))
    return found


def _corpora(quick: bool) -> list[Case]:
    """Real rows; every tool puts them together in its own way."""
    # So many that a last batch of few rows is a small part of an epoch.
    alpaca = {"kind": "corpus", "corpus": "alpaca_eval", "count": 128, "max_length": 512}
    stories = {"kind": "corpus", "corpus": "tinystories", "count": 256, "max_length": 512}
    if quick:
        stories = {**stories, "count": 32, "max_length": 448}
    found = []
    sets = (("260k", stories, 16, 5), ("15m", alpaca, 8, 3))
    for shape, rows, batch, repetitions in sets[:1] if quick else sets:
        for work, lora, tools in (
            ("sft", False, (TORCH, TUNIX)),
            ("dpo", True, (TORCH,)),
            ("dpo_plain", True, (TUNIX,)),
            ("distill", False, (TORCH, TUNIX)),
        ):
            if (work.startswith("dpo") and shape == "260k") or (quick and work != "sft"):
                continue
            name = f"{work}_corpus_{shape}"
            # A row of DPO has two answers.
            count = rows["count"] // 2 if work.startswith("dpo") else rows["count"]
            task = {
                "shape": shape,
                "batch_size": batch,
                "lora": lora,
                "batchings": ["bucket", "pack"],
                "dynamic": True,
                "corpus": True,
            }
            found.append(
                Case(
                    name=name,
                    entries=peers(work, task, tools, compiled=False),
                    comparisons=against_peers(name, dict.fromkeys(tools, _CORPUS)),
                    rows={**rows, "count": count},
                    repetitions=2 if quick else repetitions,
                    same=(OURS, *tools),
                )
            )
    return found


def _sampling(quick: bool) -> Case:
    """Prompts and budgets of mixed lengths."""
    rows = {"kind": "mixed", "count": 64, "prompts": (8, 128), "answers": (8, 128)}
    sizes = [32, 64]
    if quick:
        rows, sizes = {**rows, "count": 32, "prompts": (8, 64), "answers": (8, 64)}, [32]
    task = {"shape": "15m", "batch_sizes": sizes, "greedy_rows": 8, "greedy_tokens": 8}
    return Case(
        name="sampling_15m",
        entries=peers("sample", task, (TORCH, TUNIX), compiled=False),
        comparisons=against_peers("sampling_15m", {TORCH: 3.0, TUNIX: 2.0}),
        rows=rows,
        repetitions=2 if quick else 5,
        same=(OURS, TORCH, TUNIX),
    )


def _rounds(quick: bool) -> Case:
    """A preference round beside an SFT round on the same rows, LoRA, nothing computed twice.

    The bar is a multiple of the arithmetic. The small shape of ``quick`` is not judged by it: there
    products are the least of a step.
    """
    shape, corpus, batch = ("260k", "tinystories", 16) if quick else ("15m", "alpaca_eval", 8)
    count, longest = (32, 320) if quick else (64, 512)
    rows = {"kind": "corpus", "corpus": corpus, "count": count, "max_length": longest}
    task = {"shape": shape, "batch_size": batch, "lora": True, "sample_batch_size": 64}
    name = "preference_round_over_sft_round"
    return Case(
        name=name,
        entries=(
            Entry("preference", OURS, {"work": "preference_round", **task}),
            Entry("sft", OURS, {"work": "sft_round", **task}),
        ),
        comparisons=(
            Comparison(
                name,
                "preference",
                "sft",
                bar=None if quick else 1.4,
                lower_is_better=True,
                times_floor=True,
            ),
        ),
        rows=rows,
        repetitions=2 if quick else 4,
    )


def _startup() -> list[Case]:
    """Not a program of a worker: see ``startup``."""
    return [
        Case(
            name="startup",
            entries=(),
            comparisons=(
                Comparison("startup/cold", "cold", "", bar=35.0, lower_is_better=True),
                Comparison("startup/compiled", "compiled", "", bar=22.0, lower_is_better=True),
            ),
        )
    ]
