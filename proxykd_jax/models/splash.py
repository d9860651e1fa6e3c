"""Flash attention on TPUs: JAX's splash kernel for causal rows, packed or not.

Uses ``jax.experimental.pallas.ops.tpu.splash_attention`` with the derivative that it defines.
Scores are never in memory, blocks that causality or a window hides are skipped, and segments are
compared inside the kernel, so no mask of the scores' size is built.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from proxykd_jax.parallel.mesh import AXES
from proxykd_jax.parallel.sharding import ROWS, fitting

# Positions in one tile of the kernel.
TILE = 128
# Most positions in a block: its float32 scores take 1 MiB, and a kernel step holds a few such.
_BLOCK = 512
# The fused backward kernel computes the scores once instead of twice, but writes a gradient of the
# queries for each block of keys. It pays up to this many blocks.
_FUSED = 4
# Head sizes from 8 to this were compiled for TPUs, with both backward kernels.
_LARGEST_HEAD = 256
_HEADS = P(*ROWS, None, "tensor")
# Tests set this to run the kernel on a CPU.
_interpret = False


def obstacle(like: jax.Array, head_dim: int, num_groups: int) -> str | None:
    """A sentence that says why the kernel cannot run; None if it can.

    Args:
      like: activations ``[B, ...]`` of the queries' dtype, on their mesh.
      num_groups: key heads.
    """
    if like.dtype != jnp.bfloat16:
        return f"Splash attention needs bfloat16, got {like.dtype}."
    if head_dim > _LARGEST_HEAD:
        return (
            f"Splash attention takes heads of {_LARGEST_HEAD} dimensions at most, got {head_dim}."
        )
    mesh = jax.typeof(like).sharding.mesh
    if mesh.empty:
        return None
    if not set(AXES) <= set(mesh.axis_names):
        return f"Splash attention knows meshes of {', '.join(AXES)}, got {mesh.axis_names}."
    if fitting(_HEADS, (like.shape[0], 1, num_groups), mesh) != _HEADS:
        return (
            f"Splash attention cannot be cut: {like.shape[0]} rows over data x fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} devices, {num_groups} key heads over "
            f"tensor = {mesh.shape['tensor']}."
        )
    return None


def block_size(length: int) -> tuple[int, int]:
    """(positions per block, blocks): as few blocks as possible, as even as tiles allow.

    Rows are padded at the end to the product of the two; causality hides the padding.
    """
    blocks = -(-length // _BLOCK)
    return -(-length // (blocks * TILE)) * TILE, blocks


def attend(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGC: jax.Array,
    segment_ids_BL: jax.Array | None = None,
    *,
    window: int | None = None,
    keep_as: str,
) -> jax.Array:
    """Causal softmax(q k / sqrt(C)) v; ``out_BLHC`` in q's dtype.

    The compiler does not partition a kernel. So on a mesh of ``AXES`` each device attends for its
    own rows and heads.

    Args:
      segment_ids_BL: positions with equal ids see each other, including those with id 0.
      window: a query sees this many last positions, including its own.
      keep_as: name under which checkpointing may keep the result and the log-sums.
    """
    local: Any = functools.partial(_attend_here, window=window, keep_as=keep_as)
    segments = () if segment_ids_BL is None else (segment_ids_BL,)
    mesh = jax.typeof(q_BLHC).sharding.mesh
    if not mesh.empty:
        # JAX cannot infer over which devices a kernel's result varies.
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_HEADS, _HEADS, _HEADS, *(ROWS for _ in segments)),
            out_specs=_HEADS,
            check_vma=False,
        )
    return local(q_BLHC, k_BLGC, v_BLGC, *segments)


def _attend_here(
    q_BLHC: jax.Array,
    k_BLGC: jax.Array,
    v_BLGC: jax.Array,
    segment_ids_BL: jax.Array | None = None,
    *,
    window: int | None,
    keep_as: str,
) -> jax.Array:
    """``attend`` on one device."""
    length, num_heads, head_dim = q_BLHC.shape[1:]
    block, blocks = block_size(length)
    behind = block * blocks - length
    # Scale in float32; otherwise the factor itself would be rounded.
    q_BLHC = (q_BLHC.astype(jnp.float32) * head_dim**-0.5).astype(q_BLHC.dtype)
    q_BHLC, k_BGLC, v_BGLC = (
        jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, behind), (0, 0)))
        for x in (q_BLHC, k_BLGC, v_BLGC)
    )
    kernel = _kernel(num_heads, block, blocks, window, keep_as)
    if segment_ids_BL is None:
        out_BHLC = jax.vmap(kernel)(q_BHLC, k_BGLC, v_BGLC)
    else:
        ids_BL = jnp.pad(segment_ids_BL, ((0, 0), (0, behind)))
        out_BHLC = jax.vmap(kernel)(q_BHLC, k_BGLC, v_BGLC, _segments(ids_BL))
    return out_BHLC[:, :, :length].swapaxes(1, 2)


def _segments(ids_BL: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    return SegmentIds(ids_BL, ids_BL)


def _kernel(num_heads: int, block: int, blocks: int, window: int | None, keep_as: str) -> Any:
    """JAX's kernel for one row; it shares key heads between query heads without repeating them."""
    # The import takes a second, and only programs for TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (block * blocks,) * 2
    mask = (
        splash.CausalMask(shape)
        if window is None or window >= shape[0]
        else splash.LocalMask(shape, (window - 1, 0), 0)
    )
    # Block sizes of the non-fused backward kernel; the fused one does not accept them.
    apart = block if blocks > _FUSED else None
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=apart,
            block_kv_dq=apart,
            use_fused_bwd_kernel=apart is None,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=keep_as,
        interpret=_interpret,
    )
