"""LoRA adapters as a tree of their own, beside a base that never changes.

``{"layers": {"attention": {"q_proj": {"a": [N, D, R], "b": [N, R, O]}, ...}, "mlp": {...}}}``,
float32 over a base of any type. The update of a kernel is ``config.lora.scale * a @ b``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from proxykd_jax.models.config import ATTENTION_TARGETS, LoraConfig, ModelConfig
from proxykd_jax.models.params import ParamPath, Params, flatten, linear_shapes, unflatten
from proxykd_jax.models.quantized import QuantizedKernel

Adapter = dict[str, Any]


def _lora(config: ModelConfig) -> LoraConfig:
    if config.lora is None:
        raise ValueError("This needs a model config with lora set.")
    return config.lora


def block_of(target: str) -> str:
    """Which block of a layer a linear layer stands in: ``attention`` or ``mlp``."""
    return "attention" if target in ATTENTION_TARGETS else "mlp"


def adapter_shapes(config: ModelConfig) -> dict[str, Any]:
    """The adapter's tree with a tuple of ints at each leaf."""
    lora = _lora(config)
    shapes = linear_shapes(config)
    leaves: dict[ParamPath, tuple[int, ...]] = {}
    for target in lora.targets:
        size_in, size_out = shapes[target]
        path = ("layers", block_of(target), target)
        leaves[(*path, "a")] = (config.num_layers, size_in, lora.rank)
        leaves[(*path, "b")] = (config.num_layers, lora.rank, size_out)
    return unflatten(leaves)


def abstract_adapter(config: ModelConfig, dtype: Any = jnp.float32) -> Adapter:
    """The adapter's tree of ``jax.ShapeDtypeStruct``."""
    return unflatten(
        {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, shape in flatten(adapter_shapes(config))
        }
    )


def init_adapter(key: jax.Array, config: ModelConfig, dtype: Any = jnp.float32) -> Adapter:
    """A fresh adapter, which changes nothing: b is zero.

    a is uniform in +-1/sqrt(fan in), the distribution of PEFT's default (Kaiming uniform with
    negative slope sqrt(5)).
    """
    leaves: dict[ParamPath, Any] = {}
    for index, (path, shape) in enumerate(flatten(adapter_shapes(config))):
        if path[-1] == "b":
            leaves[path] = jnp.zeros(shape, dtype)
        else:
            bound = shape[1] ** -0.5
            leaves[path] = jax.random.uniform(
                jax.random.fold_in(key, index), shape, dtype, -bound, bound
            )
    return unflatten(leaves)


def merge(params: Params, adapter: Adapter, config: ModelConfig, dtype: Any = None) -> Params:
    """The base with the adapter folded into its kernels, added in float32.

    Args:
      dtype: type of the result's leaves; ``None`` keeps each leaf's own (float32 for a
        quantised one, which is merged as it was trained: from its few bits).
    """
    scale = _lora(config).scale
    updates = dict(flatten(adapter))

    def fold(path: ParamPath, leaf: jax.Array) -> jax.Array:
        if isinstance(leaf, QuantizedKernel):
            leaf = leaf.dequantize(jnp.float32)
        target = dtype or leaf.dtype
        if path[-1] != "kernel" or (*path[:-1], "a") not in updates:
            return leaf.astype(target)
        a_NDR, b_NRO = updates[(*path[:-1], "a")], updates[(*path[:-1], "b")]
        update = jnp.einsum(
            "ndr,nro->ndo",
            a_NDR.astype(jnp.float32),
            b_NRO.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return (leaf.astype(jnp.float32) + scale * update).astype(target)

    return unflatten({path: fold(path, leaf) for path, leaf in flatten(params)})


def lora_update(
    x: jax.Array,
    weights: dict[str, jax.Array],
    lora: LoraConfig,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """``scale * dropout(x) a b`` for one layer, in float32; x ``[..., D]`` -> ``[..., O]``.

    Dropout is off without a key.
    """
    x = x.astype(jnp.float32)
    if dropout_key is not None and lora.dropout > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - lora.dropout, x.shape)
        x = jnp.where(keep, x / (1 - lora.dropout), 0.0)
    highest = jax.lax.Precision.HIGHEST
    inner = jnp.matmul(x, weights["a"].astype(jnp.float32), precision=highest)
    return lora.scale * jnp.matmul(inner, weights["b"].astype(jnp.float32), precision=highest)
