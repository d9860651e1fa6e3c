"""Arithmetic of a model, counted from its shapes.

A compiler's own count takes a scanned layer once. Counted are matrix products, two operations a
multiply-add; causal attention is taken at the half that is not hidden.
"""

from __future__ import annotations

import math

import numpy as np

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.params import linear_shapes

# Share of the layers' forward pass that the backward pass computes again, by remat policy.
_RECOMPUTED = {"none": 0.0, "dots": 0.0, "outputs": 1.0, "full": 1.0}

# Attention has two products forwards and five backwards, two of which are the forward ones again.
_PASSES_OF_ATTENTION = 3.5
# What a score costs beside its products, in the time of so many operations of a linear layer.
_FLOPS_OF_A_SOFTMAX = 200


def layer_flops(config: ModelConfig, rows: int, length: int) -> float:
    """The layers' forward pass over whole rows, without LoRA."""
    kernels = sum(a * b for a, b in linear_shapes(config).values())
    attention = 2 * config.num_heads * config.head_dim * length  # scores and values, halved
    return 2.0 * rows * length * config.num_layers * (kernels + attention / 2)


def head_flops(config: ModelConfig, positions: int) -> float:
    """The projection onto the vocabulary."""
    return 2.0 * positions * config.model_dim * config.vocab_size


def lora_flops(config: ModelConfig, rows: int, length: int) -> float:
    """The adapter's forward pass."""
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
    """A training step: the backward pass towards the inputs costs what the forward pass does, that
    towards the weights once more, which frozen weights spare."""
    forward = forward_flops(config, rows, length)
    adapter = lora_flops(config, rows, length)
    again = _RECOMPUTED[remat] * (layer_flops(config, rows, length) + adapter)
    return forward * 2 + (forward if full else adapter) + again


def answer_flops(config: ModelConfig, rows: int, prompt: int, answer: int) -> float:
    """Prefill of the prompts, then the answers token by token."""
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
    """Whether a training step on pairs has less work with both answers in one row behind their
    prompt than with a row each.

    One row spares a prompt and the padding of the shorter answer; attention between the answers,
    which the mask hides, is computed all the same.

    Args:
      config: with ``lora`` set where an adapter is trained.
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
    """Keys and values of so many slots a row."""
    shape = (2, config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
    return math.prod(shape) * itemsize
