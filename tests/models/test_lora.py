"""Adapters: a new one changes nothing, and a merged one equals an unmerged one."""

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
    """The adapter and its gradient stay float32."""
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


@pytest.mark.parametrize(
    ("dtype", "rounding", "of_factors"), [("bfloat16", 2**-9, 2e-5), ("float32", 2e-6, 2e-6)]
)
def test_layers_of_one_input_against_float64(dtype, rounding, of_factors):
    """Updates and gradients of joint layers; with bfloat16 factors the error would be 2e-3."""
    draw = np.random.default_rng(0).normal
    x = jnp.asarray(draw(size=(120, 96)), dtype)
    weights = {
        name: {
            "a": jnp.asarray(draw(size=(96, 8)), jnp.float32),
            "b": jnp.asarray(draw(size=(8, size)), jnp.float32),
        }
        for name, size in (("q_proj", 64), ("v_proj", 32))
    }
    grads = {
        name: jnp.asarray(draw(size=(120, w["b"].shape[1])), dtype) for name, w in weights.items()
    }

    def update(x, weights):
        return lora.lora_updates(x, weights, LoraConfig(8, 16.0))

    found, transpose = jax.vjp(jax.jit(update), x, weights)
    grad_x, grad_weights = transpose(grads)

    def error(got, wanted):
        return np.linalg.norm(np.asarray(got, np.float64) - wanted) / np.linalg.norm(wanted)

    x64 = np.asarray(x, np.float64)
    of_x = 0
    for name, one in weights.items():
        a, b, grad = (np.asarray(v, np.float64) for v in (one["a"], one["b"], grads[name]))
        assert found[name].dtype == dtype
        assert error(found[name], 2 * x64 @ a @ b) < rounding  # of the result
        assert error(grad_weights[name]["a"], 2 * x64.T @ (grad @ b.T)) < of_factors
        assert error(grad_weights[name]["b"], 2 * (x64 @ a).T @ grad) < of_factors
        of_x = of_x + 2 * grad @ b.T @ a.T
    assert error(grad_x, of_x) < rounding


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
    updates = lora.lora_updates(
        x,
        {"q_proj": leaf, "k_proj": leaf},
        LoraConfig(4, 8.0, dropout=0.25),
        jax.random.key(0),
    )
    for update in updates.values():
        values, counts = np.unique(np.asarray(update), return_counts=True)
        np.testing.assert_allclose(values, [0, 2 / 0.75], rtol=1e-6)
        assert abs(counts[0] / update.size - 0.25) < 0.01
    # Each projection has its own dropout.
    both = (updates["q_proj"] == 0) & (updates["k_proj"] == 0)
    assert abs(both.mean() - 0.25**2) < 0.01


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"dropout": 1.0}, {"targets": ("lm_head",)}, {"targets": ()}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(UserError):
        LoraConfig(**wrong)


def test_the_order_of_targets_means_nothing():
    assert LoraConfig(targets=("v_proj", "q_proj")) == LoraConfig(targets=("q_proj", "v_proj"))
