"""Soft labels of a batch: the proxy's most probable tokens at each position of an answer."""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from proxykd_jax.models.chunked import map_positions
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.parallel.sharding import positions_within
from proxykd_jax.types import TokenBatch

# Elements of float32 logits that exist at a time (64 MiB).
_LOGITS_ALIVE = 1 << 24
# Largest number of vocabulary entries in one block; a power of two.
_WIDEST_BLOCK = 128


@flax.struct.dataclass
class TopKLabels:
    """Soft labels, with any leading axes; float32 in nats.

    Attributes:
      ids_K: int32, the most probable tokens, in descending order.
      logps_K: their log-probs under the full softmax at the temperature.
      gold_logps: log-prob of the label, always at temperature 1, because an answer's likelihood is
        summed from it.
      tail_logps: log of the probability outside the ids, at the temperature; -inf if zero.
    """

    ids_K: jax.Array
    logps_K: jax.Array
    gold_logps: jax.Array
    tail_logps: jax.Array


def soft_labels_of_logits(
    logits: jax.Array,
    labels: jax.Array,
    *,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TopKLabels:
    """Soft labels from logits ``[..., V]`` and labels ``[...]``.

    The tail is summed over the entries outside the ids: 1 - sum would lose all digits for a
    confident model. Only two passes read the whole vocabulary (maximum and sum of each block). The
    others read the blocks with the k largest maxima, which contain the top k.

    Args:
      vocab_size: larger or equal ids are never in the top k; their probability belongs to the tail
        (default: all may be).
    """
    logits = logits.astype(jnp.float32)
    drawable = logits.shape[-1] if vocab_size is None else min(vocab_size, logits.shape[-1])
    scores, beyond = logits[..., :drawable], logits[..., drawable:]
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]

    blocks, rest = _blocks(scores, top_k)
    number, width = blocks.shape[-2:]
    maxima = jnp.concatenate([blocks.max(axis=-1), rest.max(axis=-1, keepdims=True)], axis=-1)
    _, chosen_K = _top_k(maxima, top_k)
    chosen_K = jnp.sort(chosen_K, axis=-1)  # so that the lower id wins among equal entries
    some = jnp.take_along_axis(blocks, chosen_K[..., None], axis=-2, mode="clip")
    some = jnp.where(chosen_K[..., None] == number, rest[..., None, :], some)
    some = some.reshape(*some.shape[:-2], -1)
    values_K, places_K = _top_k(some, top_k)
    ids_K = jnp.take_along_axis(chosen_K, places_K // width, axis=-1) * width + places_K % width

    highest = values_K[..., :1]
    if drawable < logits.shape[-1]:
        highest = jnp.maximum(highest, beyond.max(axis=-1, keepdims=True))
    lowest = values_K[..., -1:]
    head = jnp.exp((values_K - highest) / temperature).sum(axis=-1)
    # Outside the ids: whole blocks without any id, and single entries of the other blocks.
    of_block, of_rest = (
        jnp.exp((part - top) / temperature).sum(axis=-1)
        for part, top in ((blocks, highest[..., None]), (rest, highest))
    )
    of_block = jnp.concatenate([of_block, of_rest[..., None]], axis=-1)
    is_chosen = jax.nn.one_hot(chosen_K, number + 1, dtype=bool).any(axis=-2)
    tail = jnp.where(is_chosen, 0.0, of_block).sum(axis=-1)
    below = jnp.where(some < lowest, jnp.exp((some - highest) / temperature), 0.0)
    # Of the entries equal to the smallest kept one, some were taken; the others are outside.
    left_out = (some >= lowest).sum(axis=-1) - top_k
    tail += below.sum(axis=-1)
    tail += left_out * jnp.exp((lowest[..., 0] - highest[..., 0]) / temperature)
    if drawable < logits.shape[-1]:
        tail += jnp.exp((beyond - highest) / temperature).sum(axis=-1)
    normalizer = jnp.log(head + tail)
    if temperature == 1.0:
        gold_logps = gold - highest[..., 0] - normalizer
    else:
        gold_logps = gold - jax.nn.logsumexp(logits, axis=-1)
    return TopKLabels(
        ids_K=ids_K,
        logps_K=(values_K - highest) / temperature - normalizer[..., None],
        gold_logps=gold_logps,
        tail_logps=jnp.log(tail) - normalizer,
    )


def _blocks(scores: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """``[..., V]`` in more than ``top_k`` blocks ``[..., V // width, width]``, and the remainder as
    one block padded with -inf. Padding the whole array instead would copy it."""
    many = max(scores.shape[-1] // (4 * top_k), 1)
    width = min(1 << many.bit_length() - 1, _WIDEST_BLOCK)
    whole = scores.shape[-1] // width * width
    blocks = scores[..., :whole].reshape(*scores.shape[:-1], -1, width)
    filling = [(0, 0)] * (scores.ndim - 1) + [(0, width - scores.shape[-1] + whole)]
    return blocks, jnp.pad(scores[..., whole:], filling, constant_values=-jnp.inf)


def _top_k(values: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array]:
    """The largest values and their indices, in descending order; the first among equal ones.

    On a CPU this is a full sort unless an XLA rewrite recognises it, and the rewrite fails if
    slices of the result are fused into it. Separate barriers prevent that (19 instead of 2,500 ms
    for 512 positions over 32,000 tokens). One barrier around both makes XLA abort on several
    devices.
    """
    values_K, places_K = map(jax.lax.optimization_barrier, jax.lax.top_k(values, top_k))
    return values_K, places_K


_STATIC = ("config", "top_k", "temperature", "vocab_size")


@functools.partial(jax.jit, static_argnames=_STATIC)
def topk_soft_labels(
    params: Any,
    adapter: Any,
    batch: TokenBatch,
    *,
    config: ModelConfig,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Soft labels of every position, inside or outside the mask.

    Args:
      params, adapter: the proxy.
      batch: B rows of L positions, packed or not.
      config: the proxy's architecture.
      top_k, temperature, vocab_size: see ``soft_labels_of_logits``.

    Returns:
      ``ids_BLK, logps_BLK, gold_logps_BL, tail_logps_BL``; see ``TopKLabels``.
    """
    hidden_BLD = batch_hidden_states(params, adapter, batch, config=config)
    found = _project(params, hidden_BLD, batch.labels_BL, config, top_k, temperature, vocab_size)
    return found.ids_K, found.logps_K, found.gold_logps, found.tail_logps


@functools.partial(jax.jit, static_argnames="config")
def hidden_rows(params: Any, adapter: Any, batch: TokenBatch, *, config: ModelConfig) -> jax.Array:
    """Hidden states of every position of a batch, ``[B * L, D]``."""
    hidden_BLD = batch_hidden_states(params, adapter, batch, config=config)
    return hidden_BLD.reshape(-1, hidden_BLD.shape[-1])


@functools.partial(jax.jit, static_argnames=_STATIC)
def soft_labels_of_hidden(
    params: Any,
    hidden_MD: jax.Array,
    labels_M: jax.Array,
    *,
    config: ModelConfig,
    top_k: int,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> TopKLabels:
    """Soft labels of M positions with these hidden states. The program depends only on M, so it
    serves batches of every length."""
    logits_MV = unembed(params, hidden_MD, config=config)
    return soft_labels_of_logits(
        logits_MV, labels_M, top_k=top_k, temperature=temperature, vocab_size=vocab_size
    )


def _project(
    params: Any,
    hidden_BLD: jax.Array,
    labels_BL: jax.Array,
    config: ModelConfig,
    top_k: int,
    temperature: float,
    vocab_size: int | None,
) -> TopKLabels:
    def head(hidden: jax.Array, labels: jax.Array) -> TopKLabels:
        logits = unembed(params, hidden, config=config)
        return soft_labels_of_logits(
            logits, labels, top_k=top_k, temperature=temperature, vocab_size=vocab_size
        )

    chunk = positions_within(_LOGITS_ALIVE, hidden_BLD, config.vocab_size)
    return map_positions(head, hidden_BLD, labels_BL, chunk=chunk)
