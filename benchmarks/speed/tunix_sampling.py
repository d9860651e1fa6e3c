"""Google-tunix's sampler on prompts that are tokens already."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler

from benchmarks.speed.protocol import Program, best_of
from benchmarks.speed.rows import Rows
from benchmarks.speed.shapes import shape_of


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    def encode(self, text: str) -> list[int]:
        """Tokens of "17 4 9"."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        return " ".join(str(token) for token in ids)

    def bos_id(self) -> int:
        """None: prompts have theirs."""
        return 0

    def eos_id(self) -> int:
        """No token, so that every answer goes on to its budget."""
        return -1

    def pad_id(self) -> int:
        """Of no prompt."""
        return 0


def sampling(model: Any, task: dict[str, Any]) -> Program:
    """Answers in batches; one goes on to the longest of its answers."""
    rows = Rows.load(task["rows"])
    shape = shape_of(task)
    prompts = [
        " ".join(map(str, row[:prompt].tolist()))
        for row, prompt in zip(rows.tokens, rows.prompt_lengths, strict=True)
    ]
    lengths = rows.prompt_lengths.tolist()
    budgets = (rows.lengths - rows.prompt_lengths).tolist()
    slots = 1 << (max(lengths) + max(budgets)).bit_length()
    sampler = Sampler(
        model,
        Numbers(),
        CacheConfig(slots, shape.layers, shape.kv_heads, shape.head_dim),
    )
    seeds = iter(range(1, 1 << 30))

    def generate(places: list[int], most: int, top_p: float | None) -> Any:
        return sampler(
            [prompts[i] for i in places],
            max_generation_steps=most,
            temperature=1.0 if top_p else 0.0,
            top_p=top_p,
            seed=next(seeds),
        )

    def draw_all(order: list[int], size: int) -> None:
        for start in range(0, len(order), size):
            places = order[start : start + size]
            generate(places, max(budgets[i] for i in places), 1.0)

    given = list(range(len(rows)))
    by_budget = sorted(given, key=lambda i: (budgets[i], lengths[i]))
    ways: dict[str, Callable[[], object]] = {
        f"{name}, batch_size={size}, top_p=1": functools.partial(draw_all, order, size)
        for name, order in (("order as given", given), ("sorted by budget", by_budget))
        for size in task["batch_sizes"]
    }
    run, settings = best_of(ways)
    places = task["greedy_tokens"]
    greedy = np.array(
        [tokens[:places] for tokens in generate(given[: task["greedy_rows"]], places, None).tokens]
    )
    return Program(
        run=run,
        results={f"greedy_{i}": float(v) for i, v in enumerate(greedy.mean(axis=0))},
        settings=settings,
        units=float(sum(budgets)),
    )
