"""A frozen base in 8 or 4 bits: its accuracy, and that nothing else changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.config import AxesConfig
from proxykd_jax.errors import UserError
from proxykd_jax.models.config import LORA_TARGETS, LoraConfig, ModelConfig
from proxykd_jax.models.decoder import REMAT_POLICIES, forward
from proxykd_jax.models.hf_weights import load_model, save_model
from proxykd_jax.models.lora import abstract_adapter, init_adapter, merge
from proxykd_jax.models.params import abstract_params, flatten, init_params, is_linear, unflatten
from proxykd_jax.models.quantized import METHODS, QuantizedKernel, block_size, quantize
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import bytes_per_device, sharding_of

# From QLoRA, appendix E. This is a second copy, which would show a slip in the module's table.
NF4 = np.array(
    [
        *(-1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022833334, -0.09105003625154495, 0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1),
    ]
)
CODES = {"int8": np.arange(-127, 128) / 127, "nf4": NF4}


def config(**changes):
    sizes = dict(
        vocab_size=96, num_layers=3, model_dim=128, ffn_dim=172, num_heads=4, num_kv_heads=2
    )
    lora = LoraConfig(4, 8.0, LORA_TARGETS, 0.0)
    return ModelConfig("llama", head_dim=32, lora=lora, initializer_range=0.1, **sizes | changes)


def quantized(params, method):
    return unflatten(
        {
            path: quantize(leaf, method=method) if is_linear(path) else leaf
            for path, leaf in flatten(params)
        }
    )


def plain(params):
    def leaf(x):
        return x.dequantize(jnp.float32) if isinstance(x, QuantizedKernel) else x

    return unflatten({path: leaf(x) for path, x in flatten(params)})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(256, 24), (2, 172, 8), (3, 64, 5)])
def test_every_weight_becomes_the_nearest_multiple_of_its_blocks_scale(method, shape):
    kernel = np.asarray(jax.random.normal(jax.random.key(0), shape)) * 0.03
    kernel[..., :4, 0] = 0
    found = quantize(jnp.asarray(kernel), method=method)
    assert found.shape == shape and found.method == method
    block = block_size(shape[-2])
    blocks = kernel.reshape(*shape[:-2], -1, block, shape[-1]).astype(np.float64)
    scales = np.asarray(found.scales, np.float64)[..., None, :]
    largest = np.abs(blocks).max(axis=-2, keepdims=True)
    assert np.all(scales >= largest) and np.all(scales <= largest * (1 + 2.0**-7))
    codes = CODES[method]
    grid = scales[..., None] * codes
    nearest = np.abs(grid - blocks[..., None]).min(axis=-1)
    back = np.asarray(found.dequantize(jnp.float32), np.float64).reshape(blocks.shape)
    np.testing.assert_allclose(np.abs(back - blocks), nearest, atol=3e-7 * largest.max())


@pytest.mark.parametrize(("method", "bits"), [("int8", 8.25), ("nf4", 4.25)])
def test_what_a_weight_costs(method, bits):
    kernel = quantize(jnp.ones((128, 64)), method=method)
    assert 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(kernel)) == bits * 128 * 64


@pytest.mark.parametrize(("method", "most"), [("int8", 0.007), ("nf4", 0.095)])
def test_the_error_on_normal_weights(method, most):
    kernel = jax.random.normal(jax.random.key(1), (1024, 64))
    back = quantize(kernel, method=method).dequantize(jnp.float32)
    error = float(jnp.linalg.norm(back - kernel) / jnp.linalg.norm(kernel))
    assert most / 3 < error < most


def test_quantising_what_four_bits_stand_for_changes_nothing():
    """So a base that was exported from its codes stays the same."""
    once = quantize(jax.random.normal(jax.random.key(2), (128, 8)), method="nf4")
    again = quantize(once.dequantize(jnp.float32), method="nf4")
    np.testing.assert_array_equal(again.scales, once.scales)
    np.testing.assert_array_equal(again.codes, once.codes)


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay(method):
    zeros = quantize(jnp.zeros((64, 3)), method=method)
    np.testing.assert_array_equal(zeros.dequantize(jnp.float32), 0)


def test_an_odd_layer_is_refused():
    with pytest.raises(UserError, match="a layer of 33 inputs cannot be cut into blocks"):
        quantize(jnp.ones((33, 4)), method="nf4")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_model_is_that_of_the_weights_the_codes_stand_for(method, remat):
    model = config()
    params = quantized(init_params(jax.random.key(0), model), method)
    adapter = jax.tree.map(lambda x: x + 0.01, init_adapter(jax.random.key(1), model))
    tokens_BL = jax.random.randint(jax.random.key(2), (2, 9), 0, model.vocab_size)

    def loss(adapter, params):
        logits_BLV = forward(params, adapter, tokens_BL, config=model, remat=remat)
        return jnp.sum(jnp.sin(logits_BLV)), logits_BLV

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, logits), grads = run(adapter, params)
    (_, expected), expected_grads = run(adapter, plain(params))
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_backward_pass_keeps_no_weights():
    """If it kept the dequantised kernels of all layers, memory would hold the plain model."""
    model = config(num_layers=16, model_dim=256, ffn_dim=1024, num_heads=8)
    size = 4 * sum(leaf.size for path, leaf in flatten(abstract_params(model)) if is_linear(path))

    def loss(adapter, params, tokens_BL):
        return forward(params, adapter, tokens_BL, config=model).sum()

    tokens_BL = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    program = jax.jit(jax.grad(loss)).lower(
        abstract_adapter(model), abstract_params(model, quantize="nf4"), tokens_BL
    )
    assert program.compile().memory_analysis().temp_size_in_bytes < size / 2


@pytest.mark.parametrize("method", METHODS)
def test_loading_makes_the_same_codes_as_quantising_the_loaded_model(method, tmp_path):
    model = config().replace(lora=None)
    params = init_params(jax.random.key(0), model)
    save_model(tmp_path / "model", model, params)
    mesh = make_mesh(AxesConfig())
    for sharding in (None, lambda path: sharding_of("/".join(path), mesh)):
        for dtype in ("float32", "bfloat16"):
            _, found = load_model(
                tmp_path / "model", dtype=dtype, quantize=method, sharding=sharding
            )
            _, whole = load_model(tmp_path / "model", dtype=dtype)
            wanted = quantized(whole, method)
            assert jax.tree.structure(found) == jax.tree.structure(wanted)
            jax.tree.map(np.testing.assert_array_equal, found, wanted)
            abstract = abstract_params(model, dtype, method)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), found) == jax.tree.map(
                lambda x: (x.shape, x.dtype), abstract
            )


def test_merging_takes_the_weights_that_the_adapter_was_trained_on():
    model = config()
    params = quantized(init_params(jax.random.key(0), model), "nf4")
    adapter = jax.tree.map(lambda x: x + 0.01, init_adapter(jax.random.key(1), model))
    merged = merge(params, adapter, model)
    jax.tree.map(np.testing.assert_array_equal, merged, merge(plain(params), adapter, model))
    tokens_BL = jax.random.randint(jax.random.key(2), (2, 9), 0, model.vocab_size)
    np.testing.assert_allclose(
        forward(merged, None, tokens_BL, config=model),
        forward(params, adapter, tokens_BL, config=model),
        rtol=1e-4,
        atol=1e-4,
    )


def test_a_mesh_that_would_cut_a_block_is_refused():
    """172 hidden units are 43 blocks of 4, which two devices cannot share."""
    params = abstract_params(config(), quantize="int8")
    assert bytes_per_device(params, {"fsdp": 2}) < bytes_per_device(params, {})
    with pytest.raises(UserError, match=r"tensor = 2 does not divide an axis of 43 of .*scales"):
        bytes_per_device(params, {"tensor": 2})
