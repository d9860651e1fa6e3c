"""cuDNN's flash attention is compared with attention in XLA, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.models.attention import attention, segment_mask

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="cuDNN attends on NVIDIA's GPUs alone"
)


def inputs(length=256, heads=8, groups=2, head_dim=64):
    rng = np.random.default_rng(0)
    shapes = [(2, length, n, head_dim) for n in (heads, groups, groups, heads)]
    return [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]


def segments(length):
    """Two packed examples, followed by padding."""
    ids = np.ones((2, length), np.int32)
    ids[:, length // 3 :] = 2
    ids[1, -length // 4 :] = 0
    return jnp.asarray(ids)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 40},
        {"packed": True},
        {"packed": True, "prefix": 17},
        {"length": 200},
        {"head_dim": 128, "groups": 8},
    ],
    ids=str,
)
def test_values_and_gradients(options):
    """Both are compared with float32 attention on the same numbers."""
    options = dict(options)
    packed, prefix = options.pop("packed", False), options.pop("prefix", None)
    window = options.pop("window", None)
    q, k, v, slope = inputs(**options)
    mask, real = None, 1.0
    if packed:
        ids = segments(q.shape[1])
        mask = segment_mask(ids, None if prefix is None else jnp.full(2, prefix))
        real = (ids > 0)[:, :, None, None]  # results at padding do not count

    def run(backend, dtype):
        def total(*x):
            out = attention(*x, mask_BLS=mask, causal=True, window=window, backend=backend)
            out = jnp.where(real, out.astype(jnp.float32), 0.0) if packed else out
            return (out.astype(jnp.float32) * slope.astype(jnp.float32)).sum(), out

        given = [x.astype(dtype) for x in (q, k, v)]
        (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(*given)
        return [out, *gradients]

    found, expected = run("cudnn", jnp.bfloat16), run("xla", jnp.float32)
    for name, one, other in zip(("out", "q", "k", "v"), found, expected, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        # bfloat16 has eight bits, and sums of a few hundred terms lose some more precision.
        error = np.abs(one - other).max() / np.abs(other).max()
        assert error < 2e-2, f"{name}: {error}"


def test_auto_takes_it():
    q, k, v, _ = inputs()
    text = str(jax.make_jaxpr(lambda *x: attention(*x, causal=True))(q, k, v))
    assert "dot_product_attention_fwd" in text
