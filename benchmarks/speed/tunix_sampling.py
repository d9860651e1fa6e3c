"""Google-tunix's sampler on prompts of tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from tunix.generate.sampler import CacheConfig, Sampler

from benchmarks.speed.protocol import Program, best_of
from benchmarks.speed.rows import Rows, mean_ids
from benchmarks.speed.shapes import shape_of


class Numbers:
    """A tokenizer whose texts are the numbers of the tokens."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text such as "17 4 9"."""
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens."""
        return " ".join(str(token) for token in ids)

    def bos_id(self) -> int:
        """An id that is not used, because prompts have their first token."""
        return 0

    def eos_id(self) -> int:
        """An id of no token, so that every answer goes on to its budget."""
        return -1

    def pad_id(self) -> int:
        """An id that no prompt contains."""
        return 0


def sampling(model: Any, task: dict[str, Any]) -> Program:
    """Draws answers in batches; a batch goes on to the longest of its answers."""
    rows = Rows.load(task["rows"])
    shape = shape_of(task)
    prompts = [" ".join(map(str, prompt.tolist())) for prompt in rows.prompts]
    slots = 1 << (int(rows.prompt_lengths.max()) + max(rows.budgets)).bit_length()
    sampler = Sampler(
        model,
        Numbers(),
        CacheConfig(slots, shape.layers, shape.kv_heads, shape.head_dim),
    )
    seeds = iter(range(1, 1 << 30))

    def generate(places: list[int], most: int, top_p: float | None = 1.0) -> Any:
        return sampler(
            [prompts[i] for i in places],
            max_generation_steps=most,
            temperature=1.0 if top_p else 0.0,
            top_p=top_p,
            seed=next(seeds),
        )

    run, settings = best_of(rows.drawing_ways(task["batch_sizes"], generate, ", top_p=1"))
    places, few = task["greedy_tokens"], list(range(task["greedy_rows"]))
    greedy = [tokens[:places] for tokens in generate(few, places, None).tokens]
    return Program(
        run=run,
        results=mean_ids(np.array(greedy)),
        settings=settings,
        units=float(rows.answer_tokens),
    )
