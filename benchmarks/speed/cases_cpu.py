"""The cases of two CPU cores, float32."""

from __future__ import annotations

from typing import Any

from benchmarks.speed.cases import (
    TORCH,
    TUNIX,
    Case,
    Comparison,
    dense,
    of_ours,
    score_over_forward,
    with_peers,
)
from benchmarks.speed.cases_growth import growth

# The bars against the peers for equal work on equal dense batches.
_DENSE = {TORCH: 1.0, TUNIX: 1.2}
_CORPUS = 1.8
# The steps of a turn take a second or more. A process that has waited for its turn pays in its
# first step for memory that the system took back meanwhile, which no training does.
_STEPS = {"260k": 8, "15m": 3, "100m": 2}


def cases(quick: bool) -> list[Case]:
    """All cases, in the order in which they run; ``quick`` leaves some out."""
    found: list[Case] = []
    for shape in ("15m",) if quick else ("260k", "15m", "100m"):
        found += _dense(shape, quick)
    found += _shared_prompt(quick)
    found += _own_ratios(quick)
    found += _corpora(quick)
    found += [_sampling(quick), _round(quick)]
    return [*found, *growth(quick), _startup()]


def _dense(shape: str, quick: bool) -> list[Case]:
    """Equal rows of one length, half of it prompt."""
    batch, length = {"260k": (16, 256), "15m": (8, 256), "100m": (4, 256)}[shape]
    if quick:
        batch, length = batch // 2, length // 2
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
        name, work = f"{work}_dense_{shape}", work.removesuffix("_lora")
        found.append(
            with_peers(
                name,
                {"work": work, "shape": shape, "batch_size": batch, "lora": lora},
                {tool: _DENSE[tool] for tool in ((TORCH,) if shape == "100m" else tools)},
                compiled=not quick and shape != "100m",
                rows=dense(batch * _STEPS[shape], length, length // 2),
                repetitions=min(repetitions, 3) if quick else repetitions,
                steps=_STEPS[shape],
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
            both = ("shared", "unshared")
            found.append(
                of_ours(
                    name,
                    {label: {"share_prompt": [label == "shared"], **task} for label in both},
                    Comparison(name, *both, bar=1.3 if of_row == "half" else None),
                    rows=dense(batch * _STEPS[shape], length, prompt),
                    repetitions=3 if quick else turns,
                    steps=_STEPS[shape],
                    same=both,
                )
            )
    return found


def _own_ratios(quick: bool) -> list[Case]:
    """How much more a part of ours costs than another part."""
    batch, length = (4, 128) if quick else (8, 256)
    steps = _STEPS["15m"]
    options = {"repetitions": 3 if quick else 7, "steps": steps}
    half = dense(batch * steps, length, length // 2)
    # Every token belongs to an answer, so the projection of prompts does not matter.
    answers = dense(batch * steps, length + 1, 1)
    task: dict[str, Any] = {"shape": "15m", "batch_size": batch}
    products = {"work": "products", "length": length, "steps": steps, **task}
    name, over = "floor_15m", "distill_over_sft_15m"
    distill = {work: {"work": work, **task} for work in ("distill", "sft")}
    least: dict[str, Any] = {"bar": 1.1, "lower_is_better": True}
    return [
        of_ours(
            name,
            {"step": {"work": "sft", **task}, "products": products},
            Comparison(name, "step", "products", measure="cpu", bar=0.75),
            rows=answers,
            **options,
        ),
        of_ours(
            over,
            distill,
            Comparison(over, "distill", "sft", **least),
            Comparison(f"memory_{over}", "distill", "sft", measure="peak", **least),
            rows=half,
            **options,
        ),
        *(
            score_over_forward({**task, "shape": shape}, bar, rows=half, **options)
            for shape, bar in ((("15m", 1.35),) if quick else (("15m", 1.35), ("100m", 1.15)))
        ),
    ]


def _corpora(quick: bool) -> list[Case]:
    """Real rows, which every tool batches in its own way."""
    # There are so many rows that a last batch of few rows is a small part of an epoch.
    alpaca: dict[str, Any] = {
        "kind": "corpus",
        "corpus": "alpaca_eval",
        "count": 128,
        "max_length": 512,
    }
    stories: dict[str, Any] = {
        "kind": "corpus",
        "corpus": "tinystories",
        "count": 256,
        "max_length": 512,
    }
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
            # A row of DPO has two answers.
            count = rows["count"] // 2 if work.startswith("dpo") else rows["count"]
            task = {
                "work": work,
                "shape": shape,
                "batch_size": batch,
                "lora": lora,
                "batchings": ["bucket", "pack"],
                "dynamic": True,
                "corpus": True,
            }
            found.append(
                with_peers(
                    f"{work}_corpus_{shape}",
                    task,
                    dict.fromkeys(tools, _CORPUS),
                    compiled=False,
                    rows={**rows, "count": count},
                    repetitions=2 if quick else repetitions,
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
    return with_peers(
        "sampling_15m",
        {"work": "sample", **task},
        {TORCH: 3.0, TUNIX: 2.0},
        compiled=False,
        rows=rows,
        repetitions=2 if quick else 5,
    )


def _round(quick: bool) -> Case:
    """A preference round beside an SFT round on the same rows, LoRA; nothing is computed twice.

    The bar is a multiple of the arithmetic. It does not judge the small shape of ``quick``, whose
    steps consist mostly of other work.
    """
    shape, corpus, batch = ("260k", "tinystories", 16) if quick else ("15m", "alpaca_eval", 8)
    count, longest = (32, 320) if quick else (64, 512)
    task = {"shape": shape, "batch_size": batch, "lora": True, "sample_batch_size": 64}
    name, both = "preference_round_over_sft_round", ("preference", "sft")
    bar = None if quick else 1.4
    return of_ours(
        name,
        {label: {"work": f"{label}_round", **task} for label in both},
        Comparison(name, *both, bar=bar, lower_is_better=True, times_floor=True),
        rows={"kind": "corpus", "corpus": corpus, "count": count, "max_length": longest},
        repetitions=2 if quick else 4,
    )


def _startup() -> Case:
    """``startup`` measures it; no worker does."""
    bars = {"cold": 35.0, "compiled": 22.0}
    records = [
        Comparison(f"startup/{name}", name, "", bar=bar, lower_is_better=True)
        for name, bar in bars.items()
    ]
    return of_ours("startup", {}, *records)
