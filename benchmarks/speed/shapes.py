"""The sizes of the measured models. Every worker reads this file, which needs no packages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# The Llama of google-tunix always rotates with this base, whatever its config says.
ROPE_THETA = 1_000_000.0
NORM_EPS = 1e-5
LORA_RANK, LORA_ALPHA = 16, 32.0


@dataclass(frozen=True)
class Shape:
    """A Llama.

    Attributes:
      vocab: number of entries of the vocabulary.
      layers, dim, ffn, heads, kv_heads: sizes of the decoder; a head has dim / heads dimensions.
      tied: whether the embedding is also the output projection.
      dtype: type of the frozen weights and of the computation.
    """

    vocab: int
    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    tied: bool = True
    dtype: str = "float32"

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def linear(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer of a block."""
        keys = self.kv_heads * self.head_dim
        return {
            "q_proj": (self.dim, self.dim),
            "k_proj": (self.dim, keys),
            "v_proj": (self.dim, keys),
            "o_proj": (self.dim, self.dim),
            "gate_proj": (self.dim, self.ffn),
            "up_proj": (self.dim, self.ffn),
            "down_proj": (self.ffn, self.dim),
        }


SHAPES = {
    # This one is for the tests of this benchmark.
    "tiny": Shape(97, 2, 32, 48, 4, 2),
    "260k": Shape(512, 5, 64, 172, 8, 4),  # stories260K
    "15m": Shape(32_000, 6, 288, 768, 6, 6),
    "100m": Shape(32_000, 12, 768, 2048, 12, 12),
    "1b": Shape(32_000, 22, 2048, 5632, 32, 4, tied=False, dtype="bfloat16"),
    "7b": Shape(32_000, 32, 4096, 11_008, 32, 32, tied=False, dtype="bfloat16"),
}


def shape_of(task: dict[str, Any]) -> Shape:
    """The shape of a task, which may ask for another vocabulary and another type."""
    shape = SHAPES[task["shape"]]
    changed = {name: task.get(name) or getattr(shape, name) for name in ("vocab", "dtype")}
    return dataclasses.replace(shape, **changed)


def compared(task: dict[str, Any]) -> dict[str, Any]:
    """The task whose greedy answers are compared; in bfloat16 roundings would change many."""
    return {**task, "dtype": "float32"}
