"""Adapters: a fresh one changes nothing, a merged one equals one beside the base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.errors import UserError
from proxykd_jax.models import llama, lora
from proxykd_jax.models.config import LORA_TARGETS, LoraConfig

forward = jax.jit(llama.forward, static_argnames="config")


def test_a_fresh_adapter_changes_nothing(small_config, helpers):
    params, tokens_BL = helpers.params(small_config), helpers.tokens(0, 2, 12)
    adapter = lora.init_adapter(jax.random.key(0), small_config)
    base = forward(params, None, tokens_BL, config=small_config)
    same = forward(params, adapter, tokens_BL, config=small_config)
    np.testing.assert_array_equal(base, same)
    a = np.asarray(adapter["layers"]["mlp"]["down_proj"]["a"])
    bound = small_config.ffn_dim**-0.5
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.95 * bound


@pytest.mark.parametrize("targets", [LORA_TARGETS, ("v_proj", "q_proj"), ("down_proj",)])
@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_beside(small_config, helpers, targets, rslora):
    config = small_config.replace(
        lora=LoraConfig(rank=4, alpha=8.0, targets=targets, rslora=rslora)
    )
    assert config.lora.scale == (4.0 if rslora else 2.0)
    params, tokens_BL = helpers.params(config), helpers.tokens(0, 2, 12)
    adapter = helpers.adapter(config)
    beside = forward(params, adapter, tokens_BL, config=config)
    merged = forward(lora.merge(params, adapter, config), None, tokens_BL, config=config)
    base = forward(params, None, tokens_BL, config=config)
    np.testing.assert_allclose(beside, merged, atol=2e-5)
    assert np.abs(beside - base).max() > 0.01


def test_merging_happens_in_float32(small_config, helpers):
    params, adapter = helpers.params(small_config), helpers.adapter(small_config)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    merged = lora.merge(half, adapter, small_config, jnp.float32)
    kernel = np.asarray(half["layers"]["mlp"]["up_proj"]["kernel"], np.float64)
    leaf = adapter["layers"]["mlp"]["up_proj"]
    expected = kernel + 2.0 * np.asarray(leaf["a"], np.float64) @ np.asarray(leaf["b"], np.float64)
    np.testing.assert_allclose(merged["layers"]["mlp"]["up_proj"]["kernel"], expected, atol=1e-6)
    kept = lora.merge(half, adapter, small_config)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(jnp.bfloat16)}


def test_float32_adapter_over_a_bfloat16_base(small_config, helpers):
    """The adapter counts as float32, and so does its gradient."""
    config, tokens_BL = small_config, helpers.tokens(0, 2, 12)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), helpers.params(config))
    adapter = helpers.adapter(config)
    hidden = llama.hidden_states(params, adapter, tokens_BL, config=config)
    assert hidden.dtype == jnp.bfloat16
    gradient = jax.jit(
        jax.grad(lambda adapter: forward(params, adapter, tokens_BL, config=config).std())
    )(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() and (leaf != 0).any() for leaf in jax.tree.leaves(gradient))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    exact = forward(wide, adapter, tokens_BL, config=config)
    near = forward(params, adapter, tokens_BL, config=config)
    assert np.sqrt(np.mean((exact - near) ** 2)) < 0.03


def test_factors_beside_bfloat16_activations_count_as_float32():
    """Update and gradients against float64: rounded factors would be off by 2e-3."""
    draw = np.random.default_rng(0).normal
    x, grad = (jnp.asarray(draw(size=(3, 40, n)), jnp.bfloat16) for n in (96, 64))
    a, b = (
        jnp.asarray(draw(size=(96, 8)), jnp.float32),
        jnp.asarray(draw(size=(8, 64)), jnp.float32),
    )
    config = LoraConfig(8, 16.0)

    def update(x, a, b):
        return lora.lora_update(x, {"a": a, "b": b}, config)

    found, transpose = jax.vjp(jax.jit(update), x, a, b)
    assert found.dtype == jnp.bfloat16
    x64, a64, b64, grad64 = (np.asarray(v, np.float64) for v in (x, a, b, grad))
    inner = x64 @ a64
    exact = (
        2 * grad64 @ b64.T @ a64.T,
        2 * np.einsum("bld,blr->dr", x64, grad64 @ b64.T),
        2 * np.einsum("blr,blo->ro", inner, grad64),
    )

    def error(got, wanted):
        return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)

    assert error(found, 2 * inner @ b64) < 2**-9  # the rounding of the result
    gradients = transpose(grad)
    assert error(gradients[0], exact[0]) < 2**-9
    assert error(gradients[1], exact[1]) < 2e-5 and error(gradients[2], exact[2]) < 2e-5


def test_dropout(small_config, helpers):
    config = small_config.replace(lora=LoraConfig(rank=4, alpha=8.0, dropout=0.5))
    params, adapter, tokens_BL = (
        helpers.params(config),
        helpers.adapter(config),
        helpers.tokens(0, 2, 12),
    )

    def run(key):
        return forward(params, adapter, tokens_BL, config=config, dropout_key=key)

    off = run(None)
    np.testing.assert_array_equal(off, forward(params, adapter, tokens_BL, config=small_config))
    first, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - off).max() > 1e-3


def test_dropout_keeps_the_mean():
    x = jnp.ones((20_000, 4))
    leaf = {"a": jnp.eye(4), "b": jnp.eye(4)}
    update = lora.lora_update(x, leaf, LoraConfig(4, 8.0, dropout=0.25), jax.random.key(0))
    values, counts = np.unique(np.asarray(update), return_counts=True)
    np.testing.assert_allclose(values, [0, 2 / 0.75], rtol=1e-6)
    assert abs(counts[0] / update.size - 0.25) < 0.01


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"dropout": 1.0}, {"targets": ("lm_head",)}, {"targets": ()}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        LoraConfig(**wrong)


def test_the_order_of_targets_means_nothing():
    assert LoraConfig(targets=("v_proj", "q_proj")) == LoraConfig(targets=("q_proj", "v_proj"))
