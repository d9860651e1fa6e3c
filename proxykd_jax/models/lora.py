"""LoRA adapters as a separate tree, beside a base that never changes.

``{"layers": {"attention": {"q_proj": {"a": [N, D, R], "b": [N, R, O]}, ...}, "mlp": {...}}}``,
float32 whatever the base's dtype. The update of a kernel is ``config.lora.scale * a @ b``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.models.config import ATTENTION_TARGETS, LORA_TARGETS, LoraConfig, ModelConfig
from proxykd_jax.models.params import ParamPath, Params, flatten, linear_shapes, unflatten
from proxykd_jax.models.quantized import QuantizedKernel

Adapter = dict[str, Any]


def _lora(config: ModelConfig) -> LoraConfig:
    if config.lora is None:
        raise ValueError("This needs a model config with lora set.")
    return config.lora


def block_of(target: str) -> str:
    """The block of a layer that contains a linear layer: ``attention`` or ``mlp``."""
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
    """A fresh adapter; it changes nothing, because b is zero.

    a is uniform in +-1/sqrt(fan in), as in PEFT's default (Kaiming uniform with negative slope
    sqrt(5)).
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
    """Folds the adapter into the base's kernels; the sum is float32.

    Args:
      dtype: dtype of the result's leaves. ``None`` keeps each leaf's own; quantised leaves become
        float32 and are merged from their dequantised values, as they were trained.
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
        return _merged(leaf, a_NDR, b_NRO, scale).astype(target)

    return unflatten({path: fold(path, leaf) for path, leaf in flatten(params)})


@functools.partial(jax.jit, static_argnames="scale")
def merged_layer(
    kernel: jax.Array | QuantizedKernel,
    a_NDR: jax.Array,
    b_NRO: jax.Array,
    layer: jax.Array | int,
    *,
    scale: float,
) -> jax.Array:
    """One layer's kernel with its update, transposed, so that a device never holds a merged model.

    Args:
      kernel: stacked kernels ``[N, D, O]``.
      a_NDR, b_NRO: the adapter's factors for them.
      layer: index of the layer.
      scale: ``config.lora.scale``.

    Returns:
      ``[O, D]``, float32.
    """

    def one(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)

    own = jax.tree.map(one, kernel)
    if isinstance(own, QuantizedKernel):
        own = own.dequantize(jnp.float32)
    return _merged(own, one(a_NDR), one(b_NRO), scale).T


def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """Kernels with their update, float32; all may have a leading axis of layers."""
    update = jnp.einsum(
        "...dr,...ro->...do",
        a.astype(jnp.float32),
        b.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return kernel.astype(jnp.float32) + scale * update


def lora_updates(
    x: jax.Array,
    weights: Mapping[str, dict[str, jax.Array]],
    lora: LoraConfig,
    dropout_key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """``scale * dropout(x) a b`` for linear layers that read the same x.

    One product covers the factors a of all these layers, in the gradient too, so x is read and its
    gradient written only once. The factors keep float32 accuracy: beside a bfloat16 x each is split
    into two bfloat16 halves (``_low_rank``).

    Args:
      x: ``[M, D]``.
      weights: by target, ``a`` ``[D, R]`` and ``b`` ``[R, O]``.
      dropout_key: switches dropout on; each layer draws its own mask.

    Returns:
      ``[M, O]`` by target, in x's dtype.
    """
    if dropout_key is None or lora.dropout == 0:
        return _updates(x, weights, lora.scale)
    found: dict[str, jax.Array] = {}
    for name, one in weights.items():
        key = jax.random.fold_in(dropout_key, LORA_TARGETS.index(name))
        kept = jnp.where(jax.random.bernoulli(key, 1 - lora.dropout, x.shape), x, 0)
        found |= _updates(kept, {name: one}, lora.scale / (1 - lora.dropout))
    return found


def _updates(
    x: jax.Array, weights: Mapping[str, dict[str, jax.Array]], scale: float
) -> dict[str, jax.Array]:
    if not weights:
        return {}
    a_DR = jnp.concatenate([one["a"].astype(jnp.float32) for one in weights.values()], axis=1)
    b_RO = tuple(scale * one["b"].astype(jnp.float32) for one in weights.values())
    if x.dtype == jnp.bfloat16:
        found = _low_rank(x, a_DR, b_RO)
    else:
        highest = jax.lax.Precision.HIGHEST
        inner = jnp.matmul(x.astype(jnp.float32), a_DR, precision=highest)
        found = tuple(
            jnp.matmul(part, b, precision=highest).astype(x.dtype)
            for part, b in zip(_parts(inner, b_RO), b_RO, strict=True)
        )
    return dict(zip(weights, found, strict=True))


def _parts(inner_MR: jax.Array, b_RO: tuple[jax.Array, ...]) -> list[jax.Array]:
    """The part of the inner product that each layer's b multiplies."""
    ends = np.cumsum([b.shape[0] for b in b_RO])
    return jnp.split(inner_MR, ends[:-1], axis=1)


# --- float32 factors beside bfloat16 activations --------------------------------------------------
#
# A float32 x would double the memory traffic, four times a layer, and use the slow units. Two
# bfloat16 halves hold 16 of a factor's 24 bits, and products of bfloat16 numbers are summed in
# float32. So the update and its gradients are accurate to 2^-16 before the update is rounded to
# bfloat16 once. On an H100 a LoRA step of 7B took 0.88 of the time (docs/log.md).


@jax.custom_vjp
def _low_rank(x: jax.Array, a_DR: jax.Array, b_RO: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return _low_rank_forward(x, a_DR, b_RO)[0]


def _low_rank_forward(
    x: jax.Array, a_DR: jax.Array, b_RO: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], Any]:
    inner = _sum_halves(_dot(x, jnp.concatenate(_halves(a_DR), axis=1), 1, 0), 1)
    updates = tuple(
        _dot(_three(part, 1), _three_against(b, 0), 1, 0, x.dtype)
        for part, b in zip(_parts(inner, b_RO), b_RO, strict=True)
    )
    return updates, (x, a_DR, b_RO, inner)


def _low_rank_backward(
    saved: Any, grads: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    x, a_DR, b_RO, inner = saved
    grad_inner = jnp.concatenate(
        [
            _sum_halves(_dot(grad, jnp.concatenate(_halves(b), axis=0), 1, 1), 1)
            for grad, b in zip(grads, b_RO, strict=True)
        ],
        axis=1,
    )
    grad_a = _sum_halves(_dot(x, jnp.concatenate(_halves(grad_inner), 1), 0, 0), 1)
    grad_b = tuple(
        _sum_halves(_dot(jnp.concatenate(_halves(part), 1), grad, 0, 0), 0)
        for part, grad in zip(_parts(inner, b_RO), grads, strict=True)
    )
    grad_x = _dot(_three(grad_inner, 1), _three_against(a_DR, 1), 1, 1, x.dtype)
    return grad_x, grad_a, grad_b


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x rounded to bfloat16, and the remainder. ``reduce_precision``, because XLA removes a cast to
    bfloat16 and back from programs for a GPU."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _three(x: jax.Array, axis: int) -> jax.Array:
    """(high, low, high); times ``_three_against`` this gives all terms but low x low."""
    high, low = _halves(x)
    return jnp.concatenate([high, low, high], axis)


def _three_against(x: jax.Array, axis: int) -> jax.Array:
    high, low = _halves(x)
    return jnp.concatenate([high, high, low], axis)


def _sum_halves(x: jax.Array, axis: int) -> jax.Array:
    first, second = jnp.split(x, 2, axis)
    return first + second


def _dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int, dtype: Any = jnp.float32) -> Any:
    """The product over these axes, summed in float32."""
    axes = (((axis_a,), (axis_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)
