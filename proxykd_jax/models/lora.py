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
    """``scale * dropout(x) a b`` for one layer; x ``[..., D]`` -> ``[..., O]`` in x's type.

    The factors are float32 and count as such: beside a bfloat16 x they are cut into two bfloat16
    halves (``_low_rank``). Dropout is off without a key.
    """
    scale = lora.scale
    if dropout_key is not None and lora.dropout > 0:
        keep = jax.random.bernoulli(dropout_key, 1 - lora.dropout, x.shape)
        x = jnp.where(keep, x, 0)
        scale /= 1 - lora.dropout
    a_DR, b_RO = weights["a"].astype(jnp.float32), scale * weights["b"].astype(jnp.float32)
    if x.dtype == jnp.bfloat16:
        return _low_rank(x, a_DR, b_RO)
    highest = jax.lax.Precision.HIGHEST
    inner = jnp.matmul(x.astype(jnp.float32), a_DR, precision=highest)
    return jnp.matmul(inner, b_RO, precision=highest).astype(x.dtype)


# --- float32 factors beside bfloat16 activations --------------------------------------------------
#
# x in float32 would be written and read twice as wide, seven times a layer, and multiplied by the
# slow units. Two bfloat16 halves of a factor hold 16 of its 24 digits, and products of bfloat16
# numbers are summed in float32, so the update and its gradients are good to 2^-16; then the update
# is rounded to bfloat16 once. On an H100 a LoRA step of 7B took 0.88 of the time (docs/log.md).


@jax.custom_vjp
def _low_rank(x: jax.Array, a_DR: jax.Array, b_RO: jax.Array) -> jax.Array:
    return _low_rank_forward(x, a_DR, b_RO)[0]


def _low_rank_forward(x: jax.Array, a_DR: jax.Array, b_RO: jax.Array) -> tuple[jax.Array, Any]:
    last = x.ndim - 1
    inner = _sum_halves(_dot(x, jnp.concatenate(_halves(a_DR), axis=1), (last,), (0,)), last)
    update = _dot(_three(inner, last), _three_against(b_RO, 0), (last,), (0,), x.dtype)
    return update, (x, a_DR, b_RO, inner)


def _low_rank_backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a_DR, b_RO, inner = saved
    last = x.ndim - 1
    rows = tuple(range(last))
    grad_inner = _sum_halves(
        _dot(grad, jnp.concatenate(_halves(b_RO), axis=0), (last,), (1,)), last
    )
    grad_a = _sum_halves(_dot(x, jnp.concatenate(_halves(grad_inner), -1), rows, rows), 1)
    grad_b = _sum_halves(_dot(jnp.concatenate(_halves(inner), -1), grad, rows, rows), 0)
    grad_x = _dot(_three(grad_inner, last), _three_against(a_DR, 1), (last,), (1,), x.dtype)
    return grad_x, grad_a, grad_b


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x rounded to bfloat16, and what that left out. Not by a cast there and back, which XLA takes
    out of programs for a GPU."""
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16)


def _three(x: jax.Array, axis: int) -> jax.Array:
    """(high, low, high): multiplied by ``_three_against`` of the other, all but low x low."""
    high, low = _halves(x)
    return jnp.concatenate([high, low, high], axis)


def _three_against(x: jax.Array, axis: int) -> jax.Array:
    high, low = _halves(x)
    return jnp.concatenate([high, high, low], axis)


def _sum_halves(x: jax.Array, axis: int) -> jax.Array:
    first, second = jnp.split(x, 2, axis)
    return first + second


def _dot(
    a: jax.Array, b: jax.Array, axes_a: Any, axes_b: Any, dtype: Any = jnp.float32
) -> jax.Array:
    """The product over these axes, summed in float32."""
    axes = ((axes_a, axes_b), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=dtype)
