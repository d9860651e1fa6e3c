"""Rotary position embeddings, with the context extensions of the Llama family."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.models.config import ModelConfig, RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    """Radians per position for each pair of head dimensions, and a factor on cos and sin.

    Returns:
      ``(frequencies, factor)``: float32 ``[head_dim / 2]``, computed in float64, and a float. The
      factor is 1 except for yarn, where it sharpens the attention (Peng et al., 2023, eq. 22).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    frequencies = rope.theta**-exponents
    factor = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, frequencies, head_dim)
        factor = _yarn_attention_factor(rope)
    return frequencies.astype(np.float32), factor


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Divides slow components by the factor, keeps fast ones, and blends those between."""
    assert rope.original_max_positions is not None  # RopeConfig checked it
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * frequencies / rope.factor + blend * frequencies


def _yarn(rope: RopeConfig, frequencies: np.ndarray, head_dim: int) -> np.ndarray:
    """Interpolates components with fewer than beta_slow turns in the original context."""
    assert rope.original_max_positions is not None  # RopeConfig checked it

    def dimension(turns: float) -> float:
        ratio = rope.original_max_positions / (turns * 2 * math.pi)  # type: ignore[operator]
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as published; avoids a division by zero below
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float64) - low) / (high - low), 0.0, 1.0)
    return ramp * frequencies / rope.factor + (1 - ramp) * frequencies


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def check_length(config: ModelConfig, length: int) -> None:
    """Refuses rows that are too long for the rotation to be defined.

    Raises:
      UserError: rope scaling is ``dynamic`` and ``length`` exceeds the model's ``max_positions``.
    """
    if config.rope.kind == "dynamic" and length > config.max_positions:
        raise UserError(
            f"Rope scaling 'dynamic' changes with the longest row of a batch, so rows beyond the "
            f"model's {config.max_positions} positions are not supported (got {length}). "
            "Use shorter rows or a model with linear, llama3 or yarn scaling."
        )


def rotation(config: ModelConfig, positions_BL: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the rotation angles, float32 ``[B, L, C/2]`` each."""
    frequencies, factor = inverse_frequencies(config.rope, config.head_dim)
    angles = positions_BL.astype(jnp.float32)[:, :, None] * jnp.asarray(frequencies)[None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x_BLHC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates dimensions i and i + C/2 of each head together, in float32; keeps the dtype."""
    first, second = jnp.split(x_BLHC.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x_BLHC.dtype)
