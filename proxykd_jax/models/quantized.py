"""A frozen base in 8 or 4 bits per weight, for the linear layers of the blocks.

A kernel [in, out] is cut into blocks of 64 inputs of one output. A block is stored as codes and one
scale, its largest magnitude, so a weight costs 8.25 or 4.25 bits. A code stands for a multiple of
the scale: k / 127 (``int8``), or one of sixteen quantiles of a normal distribution (``nf4``: QLoRA,
arXiv 2305.14314, appendix E). Embeddings, norms, biases and the output projection are not
quantised, nor are adapters, which are float32.

Two 4-bit codes share a byte, because backends differ in how they lay out, slice and index arrays of
4-bit dtypes.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.errors import UserError
from proxykd_jax.models.numerics import dot_precision

Method = Literal["int8", "nf4"]
METHODS: tuple[Method, ...] = ("int8", "nf4")
BLOCK = 64

_NF4 = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_LARGEST_INT8 = 127


@flax.struct.dataclass
class QuantizedKernel:
    """Quantised kernels ``[..., in, out]``; the leading axes are those of the plain kernel.

    Attributes:
      codes: int8 ``[..., in, out]``, or uint8 ``[..., in / 2, out]`` for ``nf4``: the first half of
        each block is in the low four bits, the second half in the high ones.
      scales: bfloat16 ``[..., in / block, out]``.
    """

    codes: jax.Array
    scales: jax.Array

    @property
    def method(self) -> Method:
        return "int8" if self.codes.dtype == jnp.int8 else "nf4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel that this stands for."""
        *lead, rows, size_out = self.codes.shape
        return (*lead, rows * codes_a_byte(self.method), size_out)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The kernel in a floating dtype, rounded once."""
        *lead, size_in, size_out = self.shape
        blocks = self.scales.shape[-2]
        codes = self.codes.reshape(*lead, blocks, -1, size_out)
        if self.method == "int8":
            values = codes.astype(jnp.float32) / _LARGEST_INT8
        else:
            nibbles = jnp.concatenate([codes & 15, codes >> 4], axis=-2)
            values = jnp.asarray(_NF4).at[nibbles].get(mode="promise_in_bounds")
        scaled = values * self.scales.astype(jnp.float32)[..., None, :]
        return scaled.astype(dtype).reshape(*lead, size_in, size_out)


def codes_a_byte(method: Method) -> int:
    """Number of codes in one byte."""
    return 1 if method == "int8" else 2


def block_size(size_in: int) -> int:
    """Inputs per block: 64, or the largest smaller power of two that divides them.

    Raises:
      UserError: an odd number of inputs, which cannot share bytes in pairs.
    """
    block = math.gcd(size_in, BLOCK)
    if block == 1:
        raise UserError(f"quantize: a layer of {size_in} inputs cannot be cut into blocks.")
    return block


def quantized_shapes(shape: tuple[int, ...], method: Method) -> QuantizedKernel:
    """Shapes and dtypes of the quantised kernel, as ``jax.ShapeDtypeStruct``."""
    *lead, size_in, size_out = shape
    blocks = size_in // block_size(size_in)
    codes = (*lead, size_in // codes_a_byte(method), size_out)
    return QuantizedKernel(
        cast(jax.Array, jax.ShapeDtypeStruct(codes, jnp.int8 if method == "int8" else jnp.uint8)),
        cast(jax.Array, jax.ShapeDtypeStruct((*lead, blocks, size_out), jnp.bfloat16)),
    )


@functools.partial(jax.jit, static_argnames="method")
def quantize(kernel: jax.Array, *, method: Method) -> QuantizedKernel:
    """Takes the nearest codes under each block's scale, which is rounded up to bfloat16 first.

    Args:
      kernel: ``[..., in, out]``, any floating dtype.
      method: one of ``METHODS``.
    """
    *lead, size_in, size_out = kernel.shape
    block = block_size(size_in)
    blocks = kernel.astype(jnp.float32).reshape(*lead, size_in // block, block, size_out)
    largest = jnp.max(jnp.abs(blocks), axis=-2, keepdims=True)
    # Round up: under a scale rounded down, a block's largest weight would exceed the last code.
    # XLA removes a cast to bfloat16 and back from programs for a GPU, so do not use one here.
    near = jax.lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=7)
    bits = jax.lax.bitcast_convert_type(near, jnp.uint32) + (near < largest) * np.uint32(1 << 16)
    scales = jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)
    values = blocks / jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    if method == "int8":
        codes = jnp.round(values * _LARGEST_INT8).astype(jnp.int8)
    else:
        middles = (_NF4[1:] + _NF4[:-1]) / 2
        nibbles = sum((values > middle).astype(jnp.uint8) for middle in middles)
        first, second = jnp.split(nibbles, 2, axis=-2)
        codes = first | (second << 4)
    return QuantizedKernel(codes.reshape(*lead, -1, size_out), scales[..., 0, :])


def matmul(x: jax.Array, kernel: jax.Array | QuantizedKernel) -> jax.Array:
    """``x W`` in x's dtype; the backward pass dequantises W again instead of storing it.

    Args:
      x: ``[..., in]``.
      kernel: ``[in, out]``.
    """
    if not isinstance(kernel, QuantizedKernel):
        return jnp.matmul(x, kernel, precision=dot_precision(x.dtype))

    def product(x: jax.Array, kernel: QuantizedKernel) -> jax.Array:
        return jnp.matmul(x, kernel.dequantize(x.dtype), precision=dot_precision(x.dtype))

    return jax.checkpoint(product, prevent_cse=False)(x, kernel)
