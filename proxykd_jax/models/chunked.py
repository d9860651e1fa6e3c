"""Works over the vocabulary a few positions at a time, so that no [B, L, V] array exists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def map_positions(function: Callable[..., Any], *arrays_BL: jax.Array, chunk: int) -> Any:
    """Applies ``function(*arrays)`` to equal slices of axis 1 and joins the results.

    The backward pass recomputes each slice, so peak memory holds the intermediates of one slice.
    Slices run along L and not B x L, because batches are sharded along B.

    Args:
      function: maps arrays ``[B, chunk, ...]`` to a tree of arrays ``[B, chunk, ...]``, position
        by position.
      arrays_BL: arrays ``[B, L, ...]``. The end is padded with zeros, by less than one position
        per slice.
      chunk: largest number of positions in a slice.

    Raises:
      ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    if chunk >= arrays_BL[0].shape[1]:
        return function(*arrays_BL)
    return _sliced(jax.checkpoint(function, prevent_cse=False), *arrays_BL, chunk=chunk)


def map_positions_once(
    function: Callable[..., jax.Array],
    frozen: Any,
    hidden_BLD: jax.Array,
    *arrays_BL: jax.Array,
    chunk: int,
) -> jax.Array:
    """``map_positions`` of ``function(frozen, hidden, *arrays)``, one value per position; only
    ``hidden`` gets a gradient.

    The gradient of each value is computed together with the value, slice by slice. Only that
    gradient, ``[B, chunk, D]`` per slice, is stored, and nothing is recomputed. The backward pass
    multiplies it by the incoming gradient. Supports reverse-mode differentiation only.
    """
    return _values_once(function, chunk, frozen, hidden_BLD, arrays_BL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _values_once(
    function: Callable[..., jax.Array],
    chunk: int,
    frozen: Any,
    hidden_BLD: jax.Array,
    arrays_BL: tuple[jax.Array, ...],
) -> jax.Array:
    return _sliced(functools.partial(function, frozen), hidden_BLD, *arrays_BL, chunk=chunk)


def _values_once_forward(
    function: Callable[..., jax.Array],
    chunk: int,
    frozen: Any,
    hidden_BLD: jax.Array,
    arrays_BL: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    def value_and_slope(hidden: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, pull = jax.vjp(lambda hidden: function(frozen, hidden, *arrays), hidden)
        (slopes,) = pull(jnp.ones_like(values))
        return values, slopes

    return _sliced(value_and_slope, hidden_BLD, *arrays_BL, chunk=chunk)


def _values_once_backward(
    function: Callable[..., jax.Array], chunk: int, slopes_BLD: jax.Array, given_BL: jax.Array
) -> tuple[None, jax.Array, None]:
    return None, (given_BL[..., None] * slopes_BLD).astype(slopes_BLD.dtype), None


_values_once.defvjp(_values_once_forward, _values_once_backward)


def _sliced(function: Callable[..., Any], *arrays_BL: jax.Array, chunk: int) -> Any:
    num_batch, length = arrays_BL[0].shape[:2]
    num_chunks = -(-length // chunk)
    if num_chunks == 1:
        return function(*arrays_BL)
    chunk = -(-length // num_chunks)  # equal slices: a short last one would cost as much

    def cut(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        split = padded.reshape(num_batch, num_chunks, chunk, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def join(array: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(array, 0, 1)
        return joined.reshape(num_batch, num_chunks * chunk, *array.shape[3:])[:, :length]

    _, out = jax.lax.scan(
        lambda _, slices: (None, function(*slices)), None, tuple(cut(array) for array in arrays_BL)
    )
    return jax.tree.map(join, out)
