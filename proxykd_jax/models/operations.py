"""Operations of a model, counted from its shapes.

A compiler's count includes a scanned layer only once. This module counts matrix products, at two
operations per multiply-add, and for causal attention only the half that is not hidden.
"""

from __future__ import annotations

import math

import numpy as np

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.params import linear_shapes

# Share of the layers' forward pass that the backward pass recomputes, by remat policy.
_RECOMPUTED = {"none": 0.0, "dots": 0.0, "outputs": 1.0, "full": 1.0}

# Attention has two forward products and five backward ones, of which two repeat the forward ones.
_PASSES_OF_ATTENTION = 3.5
# Time of one score besides its products, as the number of linear-layer operations it would take.
_FLOPS_OF_A_SOFTMAX = 200


def layer_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Forward pass of the layers over whole rows, without LoRA."""
    kernels = sum(a * b for a, b in linear_shapes(config).values())
    attention = 2 * config.num_heads * config.head_dim * length  # scores and values, half hidden
    return 2.0 * rows * length * config.num_layers * (kernels + attention / 2)


def head_flops(config: ModelConfig, positions: int) -> float:
    """The projection onto the vocabulary."""
    return 2.0 * positions * config.model_dim * config.vocab_size


def lora_flops(config: ModelConfig, rows: int, length: int) -> float:
    """Forward pass of the adapter."""
    if config.lora is None:
        return 0.0
    shapes = linear_shapes(config)
    sides = sum(sum(shapes[name]) for name in config.lora.targets)
    return 2.0 * rows * length * config.num_layers * config.lora.rank * sides


def forward_flops(config: ModelConfig, rows: int, length: int) -> float:
    """A forward pass with logits at every position."""
    return (
        layer_flops(config, rows, length)
        + lora_flops(config, rows, length)
        + head_flops(config, rows * length)
    )


def step_flops(config: ModelConfig, rows: int, length: int, *, full: bool, remat: str) -> float:
    """A training step. The backward pass costs one forward pass for the inputs and one for the
    weights; frozen weights save the second."""
    forward = forward_flops(config, rows, length)
    adapter = lora_flops(config, rows, length)
    again = _RECOMPUTED[remat] * (layer_flops(config, rows, length) + adapter)
    return forward * 2 + (forward if full else adapter) + again


def answer_flops(config: ModelConfig, rows: int, prompt: int, answer: int) -> float:
    """Prefill of the prompts, then decoding of the answers token by token."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim
    seen = answer * (prompt + answer / 2)
    kernels = layer_flops(config, rows, 1) - attention / 2 * rows
    tokens = answer * (kernels + lora_flops(config, rows, 1) + head_flops(config, rows))
    return (
        layer_flops(config, rows, prompt)
        + lora_flops(config, rows, prompt)
        + tokens
        + attention * rows * seen
    )


def sharing_pays(
    config: ModelConfig, prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray
) -> bool:
    """Whether a training step on pairs is cheaper with both answers in one row behind a shared
    prompt than with one row each.

    One row saves a prompt and the padding of the shorter answer. It pays for attention between the
    answers, which is computed although the mask hides it.

    Args:
      config: with ``lora`` set if an adapter is trained.
      prompts, chosen, rejected: integer[n], tokens of each pair's parts.
    """
    kernels = sum(a * b for a, b in linear_shapes(config).values())
    passes = 3 if config.lora is None else 2  # frozen weights need no gradient
    score = config.num_heads * (4 * config.head_dim + _FLOPS_OF_A_SOFTMAX)

    def work(lengths: np.ndarray) -> float:
        tokens = lengths.astype(np.float64)
        layers = passes * 2 * kernels * tokens
        return float(np.sum(layers + _PASSES_OF_ATTENTION * score * tokens**2 / 2))

    return work(prompts + chosen + rejected) < 2 * work(prompts + np.maximum(chosen, rejected))


def cache_bytes(config: ModelConfig, rows: int, slots: int, itemsize: int) -> int:
    """Bytes of the keys and values of ``slots`` slots in each row."""
    shape = (2, config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
    return math.prod(shape) * itemsize
