"""A random model small enough to enumerate, with distributions that are neither flat nor sharp."""

from functools import cache

import jax
import numpy as np

from proxykd_jax.models.config import LoraConfig, ModelConfig
from proxykd_jax.models.llama import forward, init_params
from proxykd_jax.models.lora import init_adapter


@cache
def tiny_model(vocab_size: int = 24, **changes):
    """(config, params, adapter); the adapter is random, so it changes the model."""
    options = {
        "num_layers": 2,
        "model_dim": 16,
        "ffn_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "lora": LoraConfig(rank=2, alpha=4.0),
        "initializer_range": 0.35,
        **changes,
    }
    config = ModelConfig("llama", vocab_size, **options)
    params = init_params(jax.random.key(0), config)
    adapter = init_adapter(jax.random.key(1), config)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    adapter = jax.tree.unflatten(
        tree,
        [
            leaf + 0.2 * jax.random.normal(key, leaf.shape)
            for key, leaf in zip(keys, leaves, strict=True)
        ],
    )
    return config, params, adapter


_forward = jax.jit(forward, static_argnames="config")


def full_logps(model, tokens) -> np.ndarray:
    """The float64 log-softmax ``[T, V]`` of the training forward pass over one row."""
    config, params, adapter = model
    # No token sees padding on its right, and with padding only one length is compiled.
    padded = np.zeros((1, -(-len(tokens) // 48) * 48), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = _forward(params, adapter, padded, config=config)
    logits = np.asarray(logits[0, : len(tokens)], np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def some_prompts(count: int, vocab_size: int = 24, longest: int = 16, seed: int = 0):
    """Prompts of mixed lengths with their row ids."""
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(1, vocab_size, rng.integers(1, longest + 1)).astype(np.int32)
        for _ in range(count)
    ]
    return prompts, [f"row {index}" for index in range(count)]
