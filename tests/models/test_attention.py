"""Grouped-query attention against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.models.attention import attention, choose_backend


def plain(q, k, v, mask):
    """Softmax attention with the keys repeated, in float64."""
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
    # Not causal by name, so computed in one block.
    _, expected = run(q, k, v, mask_BLS=jnp.asarray(seen))
    for one, other in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("length, block", [(256, 64), (192, 64), (448, 64), (352, 88), (1024, 128)])
def test_a_causal_row_is_computed_in_blocks(length, block):
    q, k, v = inputs(length=length, slots=length)
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
    assert choose_backend("auto", jnp.dtype("float32"), 64, 8) == "xla"
    assert choose_backend("xla", jnp.dtype("bfloat16"), 64, 8) == "xla"
    assert choose_backend("cudnn", jnp.dtype("bfloat16"), 64, 8) == "cudnn"
    with pytest.raises(ValueError, match="bfloat16"):
        choose_backend("cudnn", jnp.dtype("float32"), 64, 8)
    with pytest.raises(ValueError, match="auto, xla, cudnn"):
        choose_backend("flash", jnp.dtype("float32"), 64, 8)
    with pytest.raises(ValueError, match="mask"):
        attention(*inputs(slots=9), causal=True)
    with pytest.raises(ValueError, match="divide"):
        attention(*inputs(heads=6, groups=4))
