"""Log-probs of a batch's labels; logits are computed a few positions at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from proxykd_jax.losses import reduce_tokens, token_logps, topk_and_label_logps, topk_logps
from proxykd_jax.models.chunked import map_positions, map_positions_once
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.parallel.sharding import is_for, positions_within
from proxykd_jax.training.state import ModelSpec, Tree
from proxykd_jax.types import Pairs, SharedPairBatch, TokenBatch

# Up to this many float32 logits a device (256 MiB) are computed at once. Above, positions are
# chunked, which costs a second projection in the backward pass. A CPU uses the host's memory and
# computes twice as many: 0.75 to 0.85 of the time at 4,096 positions and 32,000 entries (15M).
_WHOLE_LOGITS = 1 << 26
_ON_A_CPU = 2
# With a frozen vocabulary matrix, chunks cost nothing. A CPU then computes half as many at once:
# 0.84 of a step's time compared with 512 MiB, 0.96 compared with 32 MiB (6,400 positions, 15M).
_SLICE_ON_A_CPU = 1 << 25


def positions_at_once(hidden_BLD: jax.Array, vocab_size: int, models: int = 1) -> int:
    """Returns how many positions of a row (at least 1) have their logits computed together."""
    most = _WHOLE_LOGITS * (_ON_A_CPU if is_for("cpu", hidden_BLD) else 1)
    return positions_within(most // models, hidden_BLD, vocab_size)


def label_logps(
    params: Tree,
    adapter: Tree | None,
    batch: TokenBatch,
    spec: ModelSpec,
    *,
    topk_ids_BLK: Any | None = None,
    temperature: float = 1.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Returns log-probs under the full softmax, in nats.

    Args:
      params, adapter: the model.
      batch: B rows of L positions.
      spec: the static half of the model.
      topk_ids_BLK: further ids whose log-probs are returned.
      temperature: temperature of the log-probs at these ids; the labels' is 1.
      dropout_key: turns LoRA dropout on; reference log-probs never use it.

    Returns:
      ``logps_BL`` of the labels. With ids also ``topk_logps_BLK`` and ``tail_logps_BL``, the log of
      the mass outside them (else None, None). float32; meaningless outside ``mask_BL``.
    """
    hidden_BLD = batch_hidden_states(
        params, adapter, batch, config=spec.config, remat=spec.remat, dropout_key=dropout_key
    )
    arrays = (hidden_BLD, batch.labels_BL, *(() if topk_ids_BLK is None else (topk_ids_BLK,)))
    rows, places_GA = batch.tokens_BL.shape, batch.places_GA
    if places_GA is None or places_GA.size == batch.tokens_BL.size:
        out = _project(params, spec, temperature, *arrays)
    else:
        taken = (_take(x, places_GA) for x in arrays)
        found = _project(params, spec, temperature, *taken)
        out = tuple(_put(x, places_GA, rows) for x in found)
    return (out[0], None, None) if topk_ids_BLK is None else (out[0], out[1], out[2])


def _project(
    params: Tree, spec: ModelSpec, temperature: float, hidden_GAD: jax.Array, *arrays: Any
) -> tuple[jax.Array, ...]:
    """Returns log-probs at the positions of the hidden states, as ``label_logps`` does."""

    def of_labels(params: Tree, hidden: jax.Array, labels: jax.Array) -> jax.Array:
        return token_logps(unembed(params, hidden, config=spec.config), labels)

    if len(arrays) == 1 and spec.trainable == "lora":  # the vocabulary matrix is frozen
        most = _SLICE_ON_A_CPU if is_for("cpu", hidden_GAD) else _WHOLE_LOGITS
        chunk = positions_within(most, hidden_GAD, spec.config.vocab_size)
        return (map_positions_once(of_labels, params, hidden_GAD, *arrays, chunk=chunk),)

    def head(hidden: jax.Array, labels: jax.Array, *ids: jax.Array) -> tuple[jax.Array, ...]:
        if not ids:
            return (of_labels(params, hidden, labels),)
        logits = unembed(params, hidden, config=spec.config)
        if temperature == 1.0:
            topk, tail, logps = topk_and_label_logps(logits, ids[0], labels)
            return logps, topk, tail
        return (token_logps(logits, labels), *topk_logps(logits / temperature, ids[0]))

    chunk = positions_at_once(hidden_GAD, spec.config.vocab_size)
    found: tuple[jax.Array, ...] = map_positions(head, hidden_GAD, *arrays, chunk=chunk)
    return found


def _take(x_BL: Any, places_GA: Any) -> jax.Array:
    """Gathers ``[B, L, ...]`` to ``[G, A, ...]``; an index past the end takes the last position."""

    def take(x: jax.Array, places_A: jax.Array) -> jax.Array:
        return jnp.take(x, places_A, axis=0, mode="clip")

    groups, length = len(places_GA), x_BL.shape[1]
    together = x_BL.shape[0] // groups
    return jax.vmap(take)(x_BL.reshape(groups, together * length, *x_BL.shape[2:]), places_GA)


def _put(x_GA: jax.Array, places_GA: Any, rows: tuple[int, int]) -> jax.Array:
    """Scatters ``[G, A, ...]`` to ``[B, L, ...]`` of zeros; an index past the end is dropped."""
    size = rows[0] // len(places_GA) * rows[1]

    def put(x_A: jax.Array, places_A: jax.Array) -> jax.Array:
        zeros = jnp.zeros((size, *x_A.shape[1:]), x_A.dtype)
        return zeros.at[places_A].set(x_A, mode="drop")

    return jax.vmap(put)(x_GA, places_GA).reshape(*rows, *x_GA.shape[2:])


def pair_label_logps(
    params: Tree,
    adapter: Tree | None,
    batch: Pairs,
    spec: ModelSpec,
    *,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns ``label_logps`` of ``batch.chosen`` and ``batch.rejected``, by one forward pass."""
    if isinstance(batch, SharedPairBatch):
        logps_BL, _, _ = label_logps(params, adapter, batch.rows, spec, dropout_key=dropout_key)
        return logps_BL, logps_BL
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), batch.chosen, batch.rejected)
    logps_BL, _, _ = label_logps(params, adapter, both, spec, dropout_key=dropout_key)
    chosen_BL, rejected_BL = jnp.split(logps_BL, 2)
    return chosen_BL, rejected_BL


def pair_sums(logps_BL: tuple[jax.Array, jax.Array], batch: Pairs) -> tuple[jax.Array, jax.Array]:
    """Returns ``seq_loglik_B``, log pi(y|x), of y and of y-hat from ``pair_label_logps``."""
    chosen_BL, rejected_BL = logps_BL
    return (
        reduce_tokens(chosen_BL, batch.chosen.mask_BL, reduction="sum"),
        reduce_tokens(rejected_BL, batch.rejected.mask_BL, reduction="sum"),
    )
