"""Grouped-query attention: one function, a backend by name."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Backend = Literal["auto", "xla", "cudnn"]

# Finite, so that a row whose every slot is masked gives the mean of the values and not NaN.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)


def dot_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Full float32 for float32 operands (GPU and TPU would use fewer bits), default otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def choose_backend(backend: str, dtype: jnp.dtype, head_dim: int, num_queries: int) -> str:
    """``xla`` or ``cudnn``; ``auto`` takes cuDNN's flash attention where it can serve.

    Raises:
      ValueError: unknown backend, or cuDNN asked for in a dtype that it has no kernel for.
    """
    if backend not in ("auto", "xla", "cudnn"):
        raise ValueError(f"Attention backend {backend!r} is not one of auto, xla, cudnn.")
    half = dtype in (jnp.bfloat16, jnp.float16)
    if backend == "cudnn" and not half:
        raise ValueError(f"cuDNN attention needs bfloat16 or float16, got {dtype}.")
    if backend == "auto":
        # One query a row is bound by reading the cache; flash attention gains nothing there.
        fits = half and head_dim % 8 == 0 and head_dim <= 128 and num_queries > 1
        return "cudnn" if fits and jax.default_backend() == "gpu" else "xla"
    return backend


def attention(
    q_BLHC: jax.Array,
    k_BSGC: jax.Array,
    v_BSGC: jax.Array,
    *,
    mask_BLS: jax.Array | None = None,
    causal: bool = False,
    window: int | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """softmax(q k / sqrt(C)) v with H query heads over G key heads, H a multiple of G.

    The keys and values are never repeated in memory: queries of one group are batched against
    their shared key head. The softmax is float32.

    Args:
      mask_BLS: bool, True where query L may see slot S; the leading axis may be 1.
      causal: query l sees slots up to l (L == S); combined with the mask by "and".
      window: with ``causal``, query l sees the last ``window`` slots up to l only.
      backend: see ``choose_backend``.

    Returns:
      ``out_BLHC`` in q's dtype. A query that may see nothing gets a finite vector without
      meaning.
    """
    num_batch, num_queries, num_heads, head_dim = q_BLHC.shape
    num_slots, num_groups = k_BSGC.shape[1:3]
    if num_heads % num_groups:
        raise ValueError(f"{num_heads} query heads over {num_groups} key heads do not divide.")
    if causal and num_queries != num_slots:
        raise ValueError("causal by index needs as many queries as slots; give a mask instead.")
    if choose_backend(backend, q_BLHC.dtype, head_dim, num_queries) == "cudnn":
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
    blocks = []
    block = num_queries // query_blocks(num_queries)
    for first in range(0, num_queries, block):
        # No slot past the block's last query is seen, nor one before its first query's window.
        stop = first + block
        start = 0 if window is None else max(first - window + 1, 0)
        rows, slots = (
            offset + jax.lax.broadcasted_iota(jnp.int32, (1, block, stop - start), axis)
            for offset, axis in ((first, 1), (start, 2))
        )
        seen_BLS = rows >= slots
        if window is not None:
            seen_BLS &= rows - slots < window
        if mask_BLS is not None:
            seen_BLS &= mask_BLS[:, first:stop, start:stop]
        keys, values = k_BSGC[:, start:stop], v_BSGC[:, start:stop]
        blocks.append(_attend(q_BLGQC[:, first:stop], keys, values, seen_BLS))
    return jnp.concatenate(blocks, axis=1).reshape(q_BLHC.shape)


def query_blocks(num_queries: int) -> int:
    """How many blocks the queries of a causal row are cut into.

    Eight at most (each is compiled), of 64 queries at least, all of one size. Blocks skip the half
    of the scores that nobody may see, and what is left stays in the cache: forwards and backwards
    2.3 times as fast as one block on two cores (32 rows of 256, 8 heads of 8).
    """
    even = (n for n in range(8, 1, -1) if num_queries % n == 0 and num_queries // n >= 64)
    return next(even, 1)


def _attend(
    q_BLGQC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, mask_BLS: jax.Array | None
) -> jax.Array:
    """Softmax attention; divided by the normaliser at the end, where there is the least of it."""
    precision = dot_precision(q_BLGQC.dtype)
    scores_BGQLS = jnp.einsum(
        "blgqc,bsgc->bgqls",
        q_BLGQC,
        k_BSGC,
        precision=precision,
        preferred_element_type=jnp.float32,
    ) * (q_BLGQC.shape[-1] ** -0.5)
    if mask_BLS is not None:
        scores_BGQLS = jnp.where(mask_BLS[:, None, None], scores_BGQLS, _MASKED)
    # The result does not depend on what is subtracted, so no gradient needs to pass here.
    scores_BGQLS -= jax.lax.stop_gradient(scores_BGQLS.max(axis=-1, keepdims=True))
    exp_BGQLS = jnp.exp(scores_BGQLS)
    sum_BLGQ1 = exp_BGQLS.sum(axis=-1).transpose(0, 3, 1, 2)[..., None]
    weights_BGQLS = exp_BGQLS.astype(v_BSGC.dtype)
    # No float32 result is asked for: one query against a cache in bfloat16 then has no kernel on a
    # CPU, which is found out when it runs.
    out_BLGQC = jnp.einsum("bgqls,bsgc->blgqc", weights_BGQLS, v_BSGC, precision=precision)
    return (out_BLGQC / sum_BLGQ1).astype(v_BSGC.dtype)


def segment_mask(segment_ids_BL: jax.Array, prefix_B: jax.Array | None = None) -> jax.Array:
    """mask_BLS of packed or padded rows: the same positive segment id; 0 is padding.

    With ``prefix_B`` all segments of a row see so many of its first slots too.
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
    """mask_BLS of the sliding window: a query sees keys less than ``window`` positions back."""
    return query_positions_BL[:, :, None] - key_positions_BS[:, None, :] < window
