"""Grouped-query attention: one function, a backend by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from proxykd_jax.models import splash
from proxykd_jax.parallel.cpu import second_caches
from proxykd_jax.parallel.sharding import is_for

Backend = Literal["auto", "xla", "cudnn", "splash"]

# Checkpointing keeps values of this name, so that the backward pass need not recompute attention.
RESULT = "attention_result"

# Finite: a row with every slot masked then gives the mean of the values, not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def dot_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 for float32 operands (GPU and TPU would use fewer bits), default otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def choose_backend(
    backend: str, like: jax.Array, head_dim: int, num_groups: int, *, whole_rows: bool
) -> str:
    """``xla``, ``cudnn`` or ``splash``; ``auto`` takes a flash kernel where one can run.

    On TPUs that is splash attention. It needs bfloat16, ``whole_rows`` of at least 128 positions,
    heads of at most 256 dimensions, and mesh axes that divide rows and key heads. On GPUs it is
    cuDNN's flash attention. The target is the mesh's kind of device, which need not be present;
    without a mesh it is JAX's default device.

    Args:
      like: activations ``[B, L, ...]`` with the queries' dtype and length, on their mesh.
      num_groups: number of key heads.
      whole_rows: the mask is causal by index, plus at most segments or one window.

    Raises:
      ValueError: unknown backend, or one that has no kernel for this case.
    """
    if backend not in ("auto", "xla", "cudnn", "splash"):
        raise ValueError(f"Attention backend {backend!r} is not one of auto, xla, cudnn, splash.")
    half = like.dtype in (jnp.bfloat16, jnp.float16)
    if backend == "cudnn" and not half:
        raise ValueError(f"cuDNN attention needs bfloat16 or float16, got {like.dtype}.")
    if backend in ("xla", "cudnn"):
        return backend
    obstacle = splash.obstacle(like, head_dim, num_groups)
    if not whole_rows:
        obstacle = (
            "Splash attention is for whole causal rows whose mask segments or one window describe; "
            "a dense mask, a shared prefix or layers of two kinds need xla."
        )
    if backend == "splash":
        if obstacle is not None:
            raise ValueError(obstacle)
        return backend
    num_queries = like.shape[1]
    # A row shorter than one tile of the kernel would be mostly padding.
    if obstacle is None and num_queries >= splash.TILE and is_for("tpu", like):
        return "splash"
    # With one query per row, reading the cache takes the time; flash attention gains nothing.
    fits = half and head_dim % 8 == 0 and head_dim <= 128 and num_queries > 1
    return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"


def attention(
    q_BLHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    *,
    mask_BLS: jax.Array | None = None,
    segment_ids_BL: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(C)) v with H query heads over G key heads, H a multiple of G.

    Keys and values are not repeated in memory: the queries of a group are batched against their
    shared key head. The softmax is float32.

    Args:
      mask_BLS: bool, True where query L may see slot S; the leading axis may be 1.
      segment_ids_BL: as in ``segment_mask`` (L == S); combined with the mask by "and". Splash
        attention compares the ids without building a mask. Other backends build the mask here: if
        several layers share one, pass the mask instead.
      causal: query l sees slots up to l (L == S); combined with the mask by "and".
      window: with ``causal``, query l sees only the last ``window`` slots up to l.
      backend: see ``choose_backend``. ``splash`` takes causal rows without ``mask_BLS``.

    Returns:
      ``out_BLHC`` in q's dtype. For a query that sees no slot the result is finite but
      meaningless.

    Raises:
      ValueError: heads, slots or segments that do not fit; see also ``choose_backend``.
    """
    num_batch, num_queries, num_heads, head_dim = q_BLHC.shape
    num_slots, num_groups = k_BSGC.shape[1:3]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads over {num_groups} key heads do not divide.")
    if causal and num_queries != num_slots:
        raise ValueError("causal by index needs as many queries as slots; give a mask instead.")
    if segment_ids_BL is not None and num_queries != num_slots:
        raise ValueError("segments need as many queries as slots; give a mask instead.")
    whole_rows = causal and mask_BLS is None
    chosen = choose_backend(backend, q_BLHC, head_dim, num_groups, whole_rows=whole_rows)
    if chosen == "splash":
        return splash.attend(q_BLHC, k_BSGC, v_BSGC, segment_ids_BL, window=window, keep_as=RESULT)
    if segment_ids_BL is not None:
        same_BLS = segment_mask(segment_ids_BL)
        mask_BLS = same_BLS if mask_BLS is None else mask_BLS & same_BLS
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(
            q_BLHC,
            k_BSGC,
            v_BSGC,
            mask=None if mask_BLS is None else mask_BLS[:, None],
            is_causal=causal,
            local_window_size=(window - 1, 0) if causal and window is not None else None,
            implementation="cudnn",
        )
    q_BLGQC = q_BLHC.reshape(num_batch, num_queries, num_groups, -1, head_dim)
    if not causal:
        return _attend(q_BLGQC, k_BSGC, v_BSGC, mask_BLS).reshape(q_BLHC.shape)
    # Axis R: the queries, and for each query its heads of one group.
    q_BGRC = q_BLGQC.transpose(0, 2, 1, 3, 4).reshape(num_batch, num_groups, -1, head_dim)
    k_BGCS, v_BGCS = (x_BSGC.transpose(0, 2, 3, 1) for x_BSGC in (k_BSGC, v_BSGC))
    out_BGRC = _attend_causally(q_BGRC, k_BGCS, v_BGCS, mask_BLS, window)
    out_BGLQC = out_BGRC.reshape(num_batch, num_groups, num_queries, -1, head_dim)
    return out_BGLQC.transpose(0, 2, 1, 3, 4).reshape(q_BLHC.shape)


def query_blocks(num_queries: int) -> int:
    """Number of blocks that the queries of a causal row are cut into.

    At most eight, because each is compiled; all of one size, at least 64 queries. Blocks skip the
    hidden half of the scores, and the rest stays in the CPU cache: forward and backward are 2.3
    times as fast as with one block on two cores (32 rows of 256, 8 heads of 8).
    """
    even = (n for n in range(8, 1, -1) if num_queries % n == 0 and num_queries // n >= 64)
    return next(even, 1)


def _attend(
    q_BLGQC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, mask_BLS: jax.Array | None
) -> jax.Array:
    """Softmax attention with keys and values in the cache's layout; nothing is transposed."""
    precision = dot_precision(q_BLGQC.dtype)
    scores_BGLQS = jnp.einsum(
        "blgqc,bsgc->bglqs",
        q_BLGQC,
        k_BSGC,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores_BGLQS = _scaled(scores_BGLQS, q_BLGQC.shape[-1], mask_BLS)
    # The result does not depend on the maximum that is subtracted, so it needs no gradient.
    scores_BGLQS -= jax.lax.stop_gradient(scores_BGLQS.max(axis=-1, keepdims=True))
    exp_BGLQS = jnp.exp(scores_BGLQS)
    sum_BLGQ1 = exp_BGLQS.sum(axis=-1, keepdims=True).swapaxes(1, 2)
    weights_BGLQS = exp_BGLQS.astype(v_BSGC.dtype)
    # Do not ask for a float32 result: for one query against a bfloat16 cache the CPU then has no
    # kernel, and fails only at run time.
    out_BLGQC = jnp.einsum("bglqs,bsgc->blgqc", weights_BGLQS, v_BSGC, precision=precision)
    # Divide last, where the array is smallest.
    return (out_BLGQC / sum_BLGQ1).astype(v_BSGC.dtype)


def _scaled(scores_BGLQS: jax.Array, head_dim: int, mask_BLS: jax.Array | None) -> jax.Array:
    scores_BGLQS *= head_dim**-0.5
    if mask_BLS is None:
        return scores_BGLQS
    return jnp.where(mask_BLS[:, None, :, None], scores_BGLQS, _MASKED)


# --- a whole row, with its derivative -------------------------------------------------------------


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_causally(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Causal attention of whole rows, block by block; ``out_BGRC`` in q's dtype.

    R runs over the row's S queries and, for each, its heads of one group. With the slots as the
    last axis, no product transposes an array of the scores' size, forward or backward. The backward
    pass recomputes the weights, as flash attention does (Dao et al., 2022). Storing them would mean
    another write into the stacked arrays of all layers.
    """
    return _attend_causally_forward(q_BGRC, k_BGCS, v_BGCS, mask_BLS, window)[0]


def _attend_causally_forward(
    q_BGRC: jax.Array,
    k_BGCS: jax.Array,
    v_BGCS: jax.Array,
    mask_BLS: jax.Array | None,
    window: int | None,
) -> tuple[jax.Array, Any]:
    forward = functools.partial(_forward_blocks, window=window)
    out_BGRC, log_sum_BGR1 = _in_parts(forward, q_BGRC, k_BGCS, v_BGCS, mask_BLS)
    out_BGRC = checkpoint_name(out_BGRC, RESULT)
    log_sum_BGR1 = checkpoint_name(log_sum_BGR1, RESULT)
    return out_BGRC, (q_BGRC, k_BGCS, v_BGCS, mask_BLS, out_BGRC, log_sum_BGR1)


def _attend_causally_backward(
    window: int | None, residuals: Any, grad_BGRC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_BGRC, k_BGCS, v_BGCS, mask_BLS, out_BGRC, log_sum_BGR1 = residuals
    own_BGR1 = (grad_BGRC.astype(jnp.float32) * out_BGRC.astype(jnp.float32)).sum(-1, keepdims=True)
    backward = functools.partial(_backward_blocks, window=window)
    given = (q_BGRC, k_BGCS, v_BGCS, mask_BLS, grad_BGRC, own_BGR1, log_sum_BGR1)
    return *_in_parts(backward, *given), None


def _in_parts(compute: Callable[..., Any], q_BGRC: Any, k_BGCS: Any, *rest: Any) -> Any:
    """Computes a function of rows in parts whose scores fit into the cores' own caches.

    Larger parts go through the cache that all cores share: parts of 6 MiB instead of two caches of
    1 MiB make a step of stories260K's shape 1.16 times as long. Smaller parts make products too
    small to split between cores.
    """
    num_batch, num_groups, num_rows = q_BGRC.shape[:3]
    num_slots = k_BGCS.shape[-1]
    row_bytes = 4 * num_groups * (num_rows // query_blocks(num_slots)) * num_slots
    fitting = max(second_caches() // row_bytes, 1)
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


_attend_causally.defvjp(_attend_causally_forward, _attend_causally_backward)


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
    masked = _scaled(scores_BGRS.reshape(by_query), q_BGRC.shape[-1], seen_BLS)
    return masked.reshape(scores_BGRS.shape)


def _rows(x_BGRC: jax.Array, num_queries: int, block: _Block) -> jax.Array:
    """The rows that belong to a block's queries."""
    heads = x_BGRC.shape[2] // num_queries
    return x_BGRC[:, :, block.first * heads : block.stop * heads]


def _product(equation: str, left: jax.Array, right: jax.Array, **options: Any) -> jax.Array:
    return jnp.einsum(equation, left, right, precision=dot_precision(right.dtype), **options)


# --- masks ----------------------------------------------------------------------------------------


def segment_mask(segment_ids_BL: jax.Array, prefix_B: jax.Array | None = None) -> jax.Array:
    """mask_BLS of packed or padded rows: True for equal positive segment ids; 0 is padding.

    With ``prefix_B``, all segments of a row also see that many of its first slots.
    """
    same = segment_ids_BL[:, :, None] == segment_ids_BL[:, None, :]
    seen_BLS = same & (segment_ids_BL > 0)[:, None, :]
    if prefix_B is None:
        return seen_BLS
    slots_S = jnp.arange(segment_ids_BL.shape[1])
    return seen_BLS | (slots_S[None, None, :] < prefix_B[:, None, None])


def window_mask(
    query_positions_BL: jax.Array, key_positions_BS: jax.Array, window: int
) -> jax.Array:
    """mask_BLS of the sliding window: a query sees keys fewer than ``window`` positions back."""
    return query_positions_BL[:, :, None] - key_positions_BS[:, None, :] < window
