"""Work over the vocabulary a few positions at a time, so that no [B, L, V] array lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import unembed
from proxykd_jax.models.params import Params


def map_positions(function: Callable[..., Any], *arrays_BL: jax.Array, chunk: int) -> Any:
    """``function(*arrays)`` over slices of ``chunk`` positions of axis 1, put together again.

    The backward pass computes each slice anew, so the peak holds the intermediates of one slice.
    Rows are cut along L and not along B x L, because batches are sharded along B.

    Args:
      function: maps arrays ``[B, chunk, ...]`` to a tree of arrays ``[B, chunk, ...]``, position
        by position.
      arrays_BL: arrays ``[B, L, ...]``; a last slice that is not full is padded with zeros.

    Raises:
      ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}.")
    num_batch, length = arrays_BL[0].shape[:2]
    if chunk >= length:
        return function(*arrays_BL)
    num_chunks = -(-length // chunk)

    def cut(array: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, num_chunks * chunk - length)] + [(0, 0)] * (array.ndim - 2)
        padded = jnp.pad(array, padding)
        split = padded.reshape(num_batch, num_chunks, chunk, *array.shape[2:])
        return jnp.moveaxis(split, 1, 0)

    def join(array: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(array, 0, 1)
        return joined.reshape(num_batch, num_chunks * chunk, *array.shape[3:])[:, :length]

    step = jax.checkpoint(lambda _, slices: (None, function(*slices)), prevent_cse=False)
    _, out = jax.lax.scan(step, None, tuple(cut(array) for array in arrays_BL))
    return jax.tree.map(join, out)


def token_logps_from_hidden(
    params: Params,
    hidden_BLD: jax.Array,
    labels_BL: jax.Array,
    *,
    config: ModelConfig,
    chunk: int = 128,
) -> jax.Array:
    """float32 log-probs ``[B, L]`` of the labels (aligned with the positions, not shifted here).

    Equal to a gather from ``log_softmax(unembed(...))``, with the logits of ``chunk`` positions
    a row alive at a time. A label outside the vocabulary gives minus the log-normaliser, which is
    finite: mask it.
    """

    def logps(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        logits = unembed(params, hidden, config=config)
        # A comparison and a sum keep a sharded vocabulary axis sharded; a gather does not.
        ids = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1)
        chosen = jnp.sum(jnp.where(ids == labels[..., None], logits, 0.0), axis=-1)
        return chosen - jax.scipy.special.logsumexp(logits, axis=-1)

    return map_positions(logps, hidden_BLD, labels_BL, chunk=chunk)
