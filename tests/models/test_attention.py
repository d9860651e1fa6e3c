"""Grouped-query attention is compared with float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.models import causal_blocks
from proxykd_jax.models.attention import attention, choose_backend
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import hidden_states
from proxykd_jax.models.params import init_params


def plain(q, k, v, mask):
    """Softmax attention in float64, with keys repeated for each query head of a group."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    repeats = q.shape[2] // k.shape[2]
    k, v = np.repeat(k, repeats, 2), np.repeat(v, repeats, 2)
    scores = np.einsum("blhc,bshc->bhls", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.broadcast_to(mask[:, None], scores.shape), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhls,bshc->blhc", weights, v)


def inputs(heads=6, groups=2, length=7, slots=7):
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, 8), (2, slots, groups, 8), (2, slots, groups, 8)]
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_groups_and_masks(groups):
    q, k, v = inputs(groups=groups, slots=9)
    mask = np.random.default_rng(1).random((2, 7, 9)) < 0.5
    mask[:, :, 0] = True
    out = attention(q, k, v, mask_BLS=jnp.asarray(mask))
    np.testing.assert_allclose(out, plain(q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_causality_and_window_by_index(window):
    q, k, v = inputs()
    rows, columns = np.indices((7, 7))
    mask = (rows >= columns) & (rows - columns < (window or 7))
    out = attention(q, k, v, causal=True, window=window)
    np.testing.assert_allclose(out, plain(q, k, v, mask[None]), atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 100])
def test_blocks_of_queries_equal_one_block(window):
    q, k, v = inputs(length=256, slots=256)
    mask = np.random.default_rng(1).random((2, 256, 256)) < 0.5
    rows, columns = np.indices((256, 256))
    mask[:, rows == columns] = True
    seen = mask & (rows >= columns) & (rows - columns < (window or 256))

    def total(q, k, v, **options):
        out = attention(q, k, v, **options)
        return jnp.square(out).sum(), out

    run = jax.value_and_grad(total, (0, 1, 2), has_aux=True)
    options = {"mask_BLS": jnp.asarray(mask), "causal": True, "window": window}
    (_, out), gradients = run(q, k, v, **options)
    np.testing.assert_allclose(out, plain(q, k, v, seen), atol=1e-6)
    # The mask is not declared causal, so one block computes it and JAX differentiates it.
    _, expected = run(q, k, v, mask_BLS=jnp.asarray(seen))
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("masks", [None, 1, 4])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_rows_that_are_computed_after_each_other_equal_all_at_once(monkeypatch, at_once, masks):
    rng = np.random.default_rng(0)
    q, k, v, slope = (
        jnp.asarray(rng.normal(size=(4, 128, heads, 8)), jnp.float32) for heads in (6, 2, 2, 6)
    )
    mask = None
    if masks is not None:
        mask = jnp.asarray((rng.random((masks, 128, 128)) < 0.5) | np.eye(128, dtype=bool))
    bytes_at_once = 4 * 2 * 3 * 64 * 128 * at_once
    monkeypatch.setattr(causal_blocks, "l2_cache_bytes", lambda: bytes_at_once)

    def run(x):
        out, pull = jax.vjp(lambda *x: attention(*x, mask_BLS=mask, causal=True), *x)
        return out, pull(slope)

    text = str(jax.make_jaxpr(run)((q, k, v)))
    assert ("scan" in text) == (at_once < 4)
    seen = np.tril(np.ones((1, 128, 128), bool)) & (True if mask is None else np.asarray(mask))
    out, gradients = run((q, k, v))
    np.testing.assert_allclose(out, plain(q, k, v, seen), atol=1e-6)
    whole = lambda *x: attention(*x, mask_BLS=jnp.asarray(seen))  # noqa: E731 (JAX's derivative)
    for one, other in zip(gradients, jax.vjp(whole, q, k, v)[1](slope), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


def test_rows_come_after_each_other_where_a_program_is_compiled_for_a_cpu(monkeypatch):
    monkeypatch.setattr(causal_blocks, "l2_cache_bytes", lambda: 1)
    run = jax.jit(lambda *x: attention(*x, causal=True))
    traced = run.trace(*inputs(length=64, slots=64))
    loops = {
        platform: "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert loops == {"cpu": True, "cuda": False, "tpu": False}


def test_gradients_are_those_of_differences():
    """The written-out derivative is compared with float64 differences of the reference."""
    q, k, v = inputs()
    mask = np.tril(np.ones((1, 7, 7), bool))
    slope = np.random.default_rng(5).normal(size=(2, 7, 6, 8))

    def total(x):
        return float((plain(*x, mask) * slope).sum())

    gradients = jax.grad(
        lambda *x: (attention(*x, causal=True) * slope.astype(np.float32)).sum(), (0, 1, 2)
    )(q, k, v)
    rng = np.random.default_rng(6)
    arrays = [np.asarray(x, np.float64) for x in (q, k, v)]
    for which, gradient in enumerate(gradients):
        for _ in range(10):
            place = tuple(rng.integers(size) for size in gradient.shape)
            up, down = ([x.copy() for x in arrays] for _ in range(2))
            up[which][place] += 1e-5
            down[which][place] -= 1e-5
            expected = (total(up) - total(down)) / 2e-5
            np.testing.assert_allclose(gradient[place], expected, atol=2e-5)


def test_a_checkpoint_keeps_no_scores():
    """A layer keeps arrays of the size of its inputs only, whatever the length of a row."""
    config = ModelConfig(
        family="llama",
        vocab_size=32,
        model_dim=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        ffn_dim=16,
        max_positions=128,
    )
    params = init_params(jax.random.key(0), config)
    tokens = jnp.zeros((1, 128), jnp.int32)

    def total(params):
        return hidden_states(params, None, tokens, config=config, remat="none").sum()

    scans = [
        equation
        for equation in jax.make_jaxpr(jax.grad(total))(params).eqns
        if equation.primitive.name == "scan"
    ]
    kept = [variable.aval.shape for variable in scans[0].outvars]
    assert any(shape[0] == 2 for shape in kept)  # the stacks over layers
    assert not [shape for shape in kept if shape[-1] == 128 and shape[-2] >= 64]


@pytest.mark.parametrize("length, block", [(256, 64), (192, 64), (448, 64), (352, 88), (1024, 128)])
def test_a_causal_row_is_computed_in_blocks(length, block):
    q, k, v = inputs(groups=6, length=length, slots=length)
    text = str(jax.make_jaxpr(lambda *x: attention(*x, causal=True))(q, k, v))
    assert f"{block},{length}]" in text and f"{length},{length}]" not in text


def test_a_row_that_sees_nothing_is_finite_forwards_and_backwards():
    q, k, v = inputs()
    mask = np.ones((2, 7, 7), bool)
    mask[1, 3] = False

    def total(q, k, v):
        return jnp.square(attention(q, k, v, mask_BLS=jnp.asarray(mask))).sum()

    for gradient in jax.grad(total, (0, 1, 2))(q, k, v):
        assert np.isfinite(gradient).all()


def test_keys_are_not_repeated_in_memory():
    q, k, v = inputs(heads=8, groups=1, slots=64)
    text = str(jax.make_jaxpr(lambda *x: attention(*x))(q, k, v))
    assert "64,8,8]" not in text  # a repeated key array would be [2, 64, 8, 8]


def test_softmax_is_float32_in_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    mask = np.ones((1, 7, 7), bool)
    out = attention(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), plain(q, k, v, mask), atol=0.02)


def test_backends():
    def choose(backend, dtype):
        return choose_backend(backend, jnp.zeros((1, 8, 4), dtype), 64, 4, whole_rows=True)

    assert choose("auto", jnp.float32) == choose("xla", jnp.bfloat16) == "xla"
    assert choose("cudnn", jnp.bfloat16) == "cudnn"
    with pytest.raises(ValueError, match="bfloat16"):
        choose("cudnn", jnp.float32)
    with pytest.raises(ValueError, match="auto, xla, cudnn, splash"):
        choose("flash", jnp.float32)
    with pytest.raises(ValueError, match="mask"):
        attention(*inputs(slots=9), causal=True)
    with pytest.raises(ValueError, match="segments"):
        attention(*inputs(slots=9), segment_ids_BL=jnp.zeros((2, 7), jnp.int32))
    with pytest.raises(ValueError, match="divide"):
        attention(*inputs(heads=6, groups=4))
