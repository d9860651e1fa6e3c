"""Grouped-query attention: one function, a backend by name."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from proxykd_jax.models import splash
from proxykd_jax.models.causal_blocks import attend_causally
from proxykd_jax.models.numerics import dot_precision, masked_scores
from proxykd_jax.parallel.sharding import is_for

Backend = Literal["auto", "xla", "cudnn", "splash"]

# Checkpointing keeps values of this name, so that the backward pass need not recompute attention.
RESULT = "attention_result"


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
    out_BLGQC = attend_causally(q_BLGQC, k_BSGC, v_BSGC, mask_BLS, window=window, keep_as=RESULT)
    return out_BLGQC.reshape(q_BLHC.shape)


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
    scores_BGLQS = masked_scores(scores_BGLQS, q_BLGQC.shape[-1], mask_BLS)
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
