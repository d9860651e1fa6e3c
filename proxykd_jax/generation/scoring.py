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

# float32 logits of this many elements (64 MiB) are alive at a time.
_LOGITS_ALIVE = 1 << 24


@flax.struct.dataclass
class TopKLabels:
    """Soft labels, with any leading axes; float32 in nats.

    Attributes:
      ids_K: int32, the most probable tokens, in falling order.
      logps_K: their log-probs under the full softmax at the temperature.
      gold_logps: log-prob of the label, at temperature 1 whatever the temperature: it is what
        the likelihood of an answer is summed from.
      tail_logps: log of the probability outside the ids, at the temperature; -inf for none.
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

    The tail is summed over the entries outside the ids: 1 - sum would leave no digits for a
    confident model. Which entries these are is read off the smallest kept logit, so nothing of
    the vocabulary's size is scattered.

    Args:
      vocab_size: ids from here on are never among the top k; their probability belongs to the
        tail (default: all may be).
    """
    logits = logits.astype(jnp.float32)
    drawable = logits.shape[-1] if vocab_size is None else min(vocab_size, logits.shape[-1])
    scores, beyond = logits[..., :drawable], logits[..., drawable:]
    # On a CPU top_k is a full sort until a rewrite recognises it, which it fails to do where slices
    # of the result are merged into it. Barriers keep them apart (19 against 2,500 ms for 512
    # positions over 32,000 tokens); one around both makes XLA abort where devices are several.
    values_K, ids_K = map(jax.lax.optimization_barrier, jax.lax.top_k(scores, top_k))
    gold = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="clip")[..., 0]

    highest = values_K[..., :1]
    if drawable < logits.shape[-1]:
        highest = jnp.maximum(highest, beyond.max(axis=-1, keepdims=True))
    lowest = values_K[..., -1:]
    head = jnp.exp((values_K - highest) / temperature).sum(axis=-1)
    # Faster on a CPU with the exponential last and places counted in float32 (exact up to 2^24):
    # this function took 114 in place of 157 ms for 512 positions over 32,000 tokens.
    below = jnp.exp(jnp.where(scores < lowest, (scores - highest) / temperature, -jnp.inf))
    # Of entries equal to the smallest kept one, top_k took some; the others are outside.
    left_out = jnp.where(scores >= lowest, 1.0, 0.0).sum(axis=-1) - top_k
    tied = left_out * jnp.exp((lowest[..., 0] - highest[..., 0]) / temperature)
    tail = below.sum(axis=-1) + tied
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
    """Soft labels of every position, inside the mask or not.

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
    """Soft labels of M positions with these hidden states. The program depends on M alone, so
    one serves batches of every length."""
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
