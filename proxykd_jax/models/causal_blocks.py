"""Causal attention of whole rows on XLA, block by block, with a derivative of its own.

``attention.py`` has the plain path. Axis R holds the S queries of a row and, for each query, its
heads of one group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from proxykd_jax.models.numerics import dot_precision, masked_scores
from proxykd_jax.parallel.cpu import l2_cache_bytes


def attend_causally(
    q_BLGQC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    mask_BLS: jax.Array | None = None,
    *,
    window: int | None = None,
    keep_as: str,
) -> jax.Array:
    """Softmax attention in which query l sees the slots up to l; ``out_BLGQC`` in q's dtype.

    With the slots as the last axis, no product transposes an array of the scores' size, forward or
    backward. The backward pass recomputes the weights, as flash attention does (Dao et al., 2022).
    Storing them would mean another write into the stacked arrays of all layers.

    Args:
      mask_BLS: bool, combined with causality by "and" (L == S); the leading axis may be 1.
      window: query l sees only the last ``window`` slots up to l.
      keep_as: name under which checkpointing may keep what the backward pass needs.
    """
    num_batch, num_queries, num_groups, _, head_dim = q_BLGQC.shape
    q_BGRC = q_BLGQC.transpose(0, 2, 1, 3, 4).reshape(num_batch, num_groups, -1, head_dim)
    k_BGCS, v_BGCS = (x_BSGC.transpose(0, 2, 3, 1) for x_BSGC in (k_BSGC, v_BSGC))
    out_BGRC = _attend(q_BGRC, k_BGCS, v_BGCS, mask_BLS, window, keep_as)
    out_BGLQC = out_BGRC.reshape(num_batch, num_groups, num_queries, -1, head_dim)
    return out_BGLQC.transpose(0, 2, 1, 3, 4)


def query_blocks(num_queries: int) -> int:
    """Number of blocks that the queries of a causal row are cut into.

    At most eight, because each is compiled; all of one size, at least 64 queries. Blocks skip the
    hidden half of the scores, and the rest stays in the CPU cache: forward and backward are 2.3
    times as fast as with one block on two cores (32 rows of 256, 8 heads of 8).
    """
    even = (n for n in range(8, 1, -1) if num_queries % n == 0 and num_queries // n >= 64)
    return next(even, 1)


class _Block(NamedTuple):
    """Queries ``first`` to ``stop``, which see slots ``start`` to ``stop`` (ends excluded)."""

    first: int
    stop: int
    start: int


def _blocks(num_queries: int, window: int | None) -> Iterator[_Block]:
    size = num_queries // query_blocks(num_queries)
    for first in range(0, num_queries, size):
        # No query of the block sees a slot after the last query or before the first query's window.
        yield _Block(first, first + size, max(first - window + 1, 0) if window else 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    window: int | None,
    keep_as: str,
) -> jax.Array:
    return _attend_forward(q_BGRC, k_BGCS, v_BGCS, mask_BLS, window, keep_as)[0]


def _attend_forward(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    window: int | None,
    keep_as: str,
) -> tuple[jax.Array, Any]:
    forward = functools.partial(_forward_blocks, window=window)
    out_BGRC, log_sum_BGR1 = _in_parts(forward, q_BGRC, k_BGCS, v_BGCS, mask_BLS)
    out_BGRC = checkpoint_name(out_BGRC, keep_as)
    log_sum_BGR1 = checkpoint_name(log_sum_BGR1, keep_as)
    return out_BGRC, (q_BGRC, k_BGCS, v_BGCS, mask_BLS, out_BGRC, log_sum_BGR1)


def _attend_backward(
    window: int | None, keep_as: str, residuals: Any, grad_BGRC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BGRC, k_BGCS, v_BGCS, mask_BLS, out_BGRC, log_sum_BGR1 = residuals
    own_BGR1 = (grad_BGRC.astype(jnp.float32) * out_BGRC.astype(jnp.float32)).sum(-1, keepdims=True)
    backward = functools.partial(_backward_blocks, window=window)
    given = (q_BGRC, k_BGCS, v_BGCS, mask_BLS, grad_BGRC, own_BGR1, log_sum_BGR1)
    return *_in_parts(backward, *given), None


_attend.defvjp(_attend_forward, _attend_backward)


def _in_parts(compute: Callable[..., Any], q_BGRC: Any, k_BGCS: Any, *rest: Any) -> Any:
    """Computes a function of rows in parts whose scores fit into the cores' own caches.

    Larger parts go through the cache that all cores share: parts of 6 MiB instead of two caches of
    1 MiB make a step of stories260K's shape 1.16 times as long. Smaller parts make products too
    small to split between cores.
    """
    num_batch, num_groups, num_rows = q_BGRC.shape[:3]
    num_slots = k_BGCS.shape[-1]
    row_bytes = 4 * num_groups * (num_rows // query_blocks(num_slots)) * num_slots
    fitting = max(l2_cache_bytes() // row_bytes, 1)
    at_once = next(n for n in range(num_batch, 0, -1) if num_batch % n == 0 and n <= fitting)
    # Leave rows alone that are sharded over devices.
    if at_once == num_batch or jax.device_count() > 1:
        return compute(q_BGRC, k_BGCS, *rest)

    def part_by_part(*given: Any) -> Any:
        def parts(x: jax.Array) -> jax.Array:
            x = jnp.broadcast_to(x, (num_batch, *x.shape[1:]))  # the mask may have one row for all
            return x.reshape(-1, at_once, *x.shape[1:])

        found = jax.lax.map(lambda part: compute(*part), jax.tree.map(parts, given))
        return jax.tree.map(lambda x: x.reshape(num_batch, *x.shape[2:]), found)

    # Decide by the platform that the program is compiled for, not by the one it is compiled on.
    return jax.lax.platform_dependent(q_BGRC, k_BGCS, *rest, cpu=part_by_part, default=compute)


def _forward_blocks(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    *,
    window: int | None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BGRC, log of the sum of exponentials ``[B, G, R, 1]``)."""
    outs, log_sums = [], []
    for block in _blocks(k_BGCS.shape[-1], window):
        scores_BGRS = _block_scores(q_BGRC, k_BGCS, mask_BLS, window, block)
        highest_BGR1 = scores_BGRS.max(axis=-1, keepdims=True)
        exp_BGRS = jnp.exp(scores_BGRS - highest_BGR1)
        sum_BGR1 = exp_BGRS.sum(axis=-1, keepdims=True)
        values_BGCS = v_BGCS[..., block.start : block.stop]
        out_BGRC = _product("bgrs,bgcs->bgrc", exp_BGRS.astype(v_BGCS.dtype), values_BGCS)
        # Divide last, where the array is smallest.
        outs.append((out_BGRC / sum_BGR1).astype(q_BGRC.dtype))
        log_sums.append(highest_BGR1 + jnp.log(sum_BGR1))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_sums, axis=2)


def _backward_blocks(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    grad_BGRC: jax.Array,
    own_BGR1: jax.Array,
    log_sum_BGR1: jax.Array,
    *,
    window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v.

    With weights p and out = p v, the gradient of a score is p (grad v - own), where
    own = grad out.
    """
    num_slots = k_BGCS.shape[-1]
    scale = q_BGRC.shape[-1] ** -0.5  # scale of the scores, applied to the smaller array
    of_queries: list[jax.Array] = []
    of_keys, of_values = jnp.zeros_like(k_BGCS), jnp.zeros_like(v_BGCS)
    for block in _blocks(num_slots, window):
        seen = slice(block.start, block.stop)
        queries_BGRC, grads_BGRC = (_rows(x, num_slots, block) for x in (q_BGRC, grad_BGRC))
        scores_BGRS = _block_scores(q_BGRC, k_BGCS, mask_BLS, window, block)
        weights_BGRS = jnp.exp(scores_BGRS - _rows(log_sum_BGR1, num_slots, block))
        slope_BGRS = _product(
            "bgrc,bgcs->bgrs", grads_BGRC, v_BGCS[..., seen], preferred_element_type=jnp.float32
        )
        slope_BGRS = weights_BGRS * (slope_BGRS - _rows(own_BGR1, num_slots, block))
        slope_BGRS = slope_BGRS.astype(q_BGRC.dtype)
        of_queries.append(_product("bgrs,bgcs->bgrc", slope_BGRS, k_BGCS[..., seen]) * scale)
        outside = ((0, 0), (0, 0), (0, 0), (block.start, num_slots - block.stop))
        part_BGCS = _product("bgrc,bgrs->bgcs", queries_BGRC * scale, slope_BGRS)
        of_keys += jnp.pad(part_BGCS, outside)
        weights_BGRS = weights_BGRS.astype(grad_BGRC.dtype)
        part_BGCS = _product("bgrc,bgrs->bgcs", grads_BGRC, weights_BGRS)
        of_values += jnp.pad(part_BGCS, outside)
    return jnp.concatenate(of_queries, axis=2), of_keys, of_values


def _block_scores(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    window: int | None,
    block: _Block,
) -> jax.Array:
    """float32 ``scores_BGRS`` of a block, scaled and masked."""
    first, stop, start = block
    queries, slots = (
        offset + jax.lax.broadcasted_iota(jnp.int32, (1, stop - first, stop - start), axis)
        for offset, axis in ((first, 1), (start, 2))
    )
    seen_BLS = queries >= slots
    if window is not None:
        seen_BLS &= queries - slots < window
    if mask_BLS is not None:
        seen_BLS &= mask_BLS[:, first:stop, start:stop]
    scores_BGRS = _product(
        "bgrc,bgcs->bgrs",
        _rows(q_BGRC, k_BGCS.shape[-1], block),
        k_BGCS[..., start:stop],
        preferred_element_type=jnp.float32,
    )
    num_batch, num_groups, _, num_slots = scores_BGRS.shape
    by_query = (num_batch, num_groups, stop - first, -1, num_slots)
    masked = masked_scores(scores_BGRS.reshape(by_query), q_BGRC.shape[-1], seen_BLS)
    return masked.reshape(scores_BGRS.shape)


def _rows(x_BGRC: jax.Array, num_queries: int, block: _Block) -> jax.Array:
    """The rows that belong to a block's queries."""
    heads = x_BGRC.shape[2] // num_queries
    return x_BGRC[:, :, block.first * heads : block.stop * heads]


def _product(equation: str, left: jax.Array, right: jax.Array, **options: Any) -> jax.Array:
    return jnp.einsum(equation, left, right, precision=dot_precision(right.dtype), **options)
