"""Splash attention, interpreted on a CPU, is compared with float64 NumPy and with XLA."""

import functools
from collections import Counter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from proxykd_jax.models import splash
from proxykd_jax.models.attention import attention, choose_backend
from proxykd_jax.models.decoder import hidden_states
from proxykd_jax.models.params import init_params
from proxykd_jax.parallel.mesh import AXES


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch):
    monkeypatch.setattr(splash, "_interpret", True)


def numbers(length, heads, groups, head_dim, dtype=np.float32):
    """Random q, k, v and a random gradient of the result."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, n, head_dim) for n in (heads, groups, groups, heads)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(length):
    """Two rows of segments: one ends in padding, the other begins with it."""
    ids = np.zeros((2, length), np.int32)
    ids[0, : length // 3], ids[0, length // 3 : length - 5] = 1, 2
    ids[1, 9:20], ids[1, 20 : length // 2], ids[1, length // 2 :] = 1, 2, 3
    return ids


def seen(length, window, ids=None):
    rows, columns = np.indices((length, length))
    mask = ((rows >= columns) & (rows - columns < (window or length)))[None]
    return mask if ids is None else mask & (ids[:, :, None] == ids[:, None, :])


def in_float64(q, k, v, slope, mask):
    """The result and the gradients of q, k and v."""
    q, k, v, slope = (np.asarray(x, np.float64) for x in (q, k, v, slope))
    groups, shared, scale = k.shape[2], q.shape[2] // k.shape[2], q.shape[-1] ** -0.5
    k, v = np.repeat(k, shared, 2), np.repeat(v, shared, 2)
    scores = np.where(mask[:, None], np.einsum("blhc,bshc->bhls", q, k) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    slopes = np.einsum("blhc,bshc->bhls", slope, v)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    of_keys, of_values = (
        x.reshape(*x.shape[:2], groups, shared, -1).sum(3)
        for x in (
            np.einsum("bhls,blhc->bshc", slopes, q),
            np.einsum("bhls,blhc->bshc", weights, slope),
        )
    )
    result = np.einsum("bhls,bshc->blhc", weights, v)
    return result, np.einsum("bhls,bshc->blhc", slopes, k), of_keys, of_values


# One block; two blocks, the second padded; five blocks, which have two backward kernels.
@pytest.mark.parametrize(
    "length, block, heads, groups, window, is_packed",
    [
        (100, 512, 4, 4, None, False),
        (128, 512, 6, 2, 1, True),
        (520, 512, 2, 1, None, True),
        (520, 512, 2, 1, 300, False),
        (600, 128, 4, 2, None, False),
        (600, 128, 4, 2, 200, True),
    ],
)
def test_values_and_gradients(monkeypatch, length, block, heads, groups, window, is_packed):
    monkeypatch.setattr(splash, "_BLOCK", block)
    q, k, v, slope = numbers(length, heads, groups, 8)
    ids = packed(length) if is_packed else None

    @jax.jit
    def run(q, k, v, slope):
        attend = functools.partial(splash.attend, segment_ids_BL=ids, window=window, keep_as="")
        result, pull = jax.vjp(attend, q, k, v)
        return result, *pull(slope)

    # Padding attends to padding, and nothing uses the result.
    expected = in_float64(q, k, v, slope, seen(length, window, ids))
    for one, other in zip(run(q, k, v, slope), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_bfloat16():
    q, k, v, slope = numbers(200, 4, 2, 64, jnp.bfloat16)
    ids = packed(200)

    @jax.jit
    def run(q, k, v, slope):
        attend = functools.partial(
            attention, segment_ids_BL=jnp.asarray(ids), causal=True, backend="splash"
        )
        result, pull = jax.vjp(attend, q, k, v)
        return result, *pull(slope)

    expected = in_float64(q, k, v, slope, seen(200, None, ids))
    for one, other in zip(run(q, k, v, slope), expected, strict=True):
        assert one.dtype == jnp.bfloat16
        # Two bfloat16 steps of the largest values in a sum.
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0.02, atol=0.03)


def test_segments_equal_their_mask_with_every_backend():
    q, k, v, _ = numbers(130, 4, 2, 8, jnp.bfloat16)
    ids = packed(130)
    mask = jnp.asarray((ids[:, :, None] == ids[:, None, :]) & (ids > 0)[:, None, :])
    by_mask = attention(q, k, v, mask_BLS=mask, causal=True, window=40)
    for backend in ("xla", "splash"):
        by_ids = attention(
            q, k, v, segment_ids_BL=jnp.asarray(ids), causal=True, window=40, backend=backend
        )
        one, other = (np.asarray(x, np.float32)[ids > 0] for x in (by_ids, by_mask))
        np.testing.assert_allclose(one, other, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "length, padded, block",
    [(1, 128, 128), (512, 512, 512), (513, 768, 384), (1024, 1024, 512), (1100, 1152, 384)],
)
def test_blocks_are_few_and_even(length, padded, block):
    size, count = splash.block_size(length)
    assert (size, size * count) == (block, padded)


# --- through the decoder --------------------------------------------------------------------------


def kernels(jaxpr):
    """Counts the Pallas kernels of each name in a program and its inner programs."""
    found = Counter()
    for equation in jaxpr.eqns:
        if not equation.outvars:  # nothing uses this inner program, so compilers drop it
            continue
        if equation.primitive.name == "pallas_call":
            found[equation.params["name"]] += 1
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            found += kernels(inner) if hasattr(inner, "eqns") else Counter()
    return found


def loss_of(config, remat, backend, **rows):
    """A function of parameters that depends on the hidden states of real tokens."""
    real = rows.get("segment_ids_BL", np.ones((2, 140), np.int32)) > 0

    def total(params):
        tokens = jnp.arange(280, dtype=jnp.int32).reshape(2, 140) % config.vocab_size
        hidden = hidden_states(
            params, None, tokens, config=config, remat=remat, attention=backend, **rows
        )
        return jnp.where(real[:, :, None], jnp.sin(hidden), 0).sum()

    return total


@pytest.mark.parametrize("remat, sliding", [("none", ()), ("full", (0, 1, 2))])
def test_a_decoder_learns_as_with_xla(monkeypatch, small_config, remat, sliding):
    """The rows are packed and float32, which the kernel computes exactly on a CPU."""
    monkeypatch.setattr(splash, "obstacle", lambda *_: None)
    config = small_config.replace(sliding_layers=sliding, sliding_window=30 if sliding else None)
    params = init_params(jax.random.key(0), config)
    ids = packed(140)
    starts = np.maximum.accumulate(
        np.where(np.diff(ids, axis=1, prepend=-1) != 0, np.arange(140)[None], 0), axis=1
    )
    rows = {"segment_ids_BL": ids, "positions_BL": (np.arange(140)[None] - starts)}
    found, expected = (
        jax.jit(jax.value_and_grad(loss_of(config, remat, backend, **rows)))(params)
        for backend in ("splash", "xla")
    )
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found[1], expected[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("remat, forwards", [("none", 1), ("outputs", 2), ("full", 2)])
def test_what_a_checkpoint_keeps(small_config, remat, forwards):
    config = small_config.replace(sliding_layers=(), sliding_window=None)
    params = init_params(jax.random.key(0), config, jnp.bfloat16)
    jaxpr = jax.make_jaxpr(jax.grad(loss_of(config, remat, "splash")))(params)
    found = kernels(jaxpr.jaxpr)
    assert sum(n for name, n in found.items() if "_fwd" in name) == forwards
    assert sum(found.values()) == forwards + 1
    scan = next(equation for equation in jaxpr.eqns if equation.primitive.name == "scan")
    kept = Counter(variable.aval.shape for variable in scan.outvars)
    # The result, and the logarithms of the sums, for a row that was padded to a block.
    heads = (config.num_layers, 2, config.num_heads, 256)
    assert kept[(*heads, config.head_dim)] == kept[heads] == (remat == "none")
    assert not [shape for shape in kept if shape[-2:] in ((140, 140), (256, 256))]


# --- where it is chosen ---------------------------------------------------------------------------


class Described(NamedTuple):
    """What JAX knows about the devices of a mesh that does not exist."""

    device_kind: str
    num_cores: int = 1
    platform: str = "tpu"


def rows_on(kind, *shape, dtype=jnp.bfloat16, mesh=(1, 1, 1)):
    """Traced rows on a mesh of devices of one kind, as ``choose_backend`` sees them."""
    found = []
    mesh = AbstractMesh(mesh, AXES, (AxisType.Auto,) * 3, abstract_device=Described(kind))
    given = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))
    jax.jit(lambda x: found.append(x) or x).trace(given)
    return found[0]


@pytest.mark.parametrize(
    "like, head_dim, groups, whole_rows, expected",
    [
        (("TPU v5", 8, 256, 4), 64, 4, True, "splash"),
        (("TPU v5 lite", 8, 200, 4), 8, 1, True, "splash"),
        (("TPU v5", 8, 256, 4), 64, 4, False, "xla"),
        (("TPU v5", 8, 127, 4), 64, 4, True, "xla"),
        (("TPU v5", 8, 256, 4), 512, 4, True, "xla"),
        (("cpu", 8, 256, 4), 64, 4, True, "xla"),
    ],
)
def test_programs_for_tpus_attend_by_it(like, head_dim, groups, whole_rows, expected):
    chosen = choose_backend("auto", rows_on(*like), head_dim, groups, whole_rows=whole_rows)
    assert chosen == expected


def test_what_cannot_be_served():
    def ask(*like, groups=4, whole_rows=True, **options):
        like = rows_on("TPU v5", *like, **options)
        assert choose_backend("auto", like, 64, groups, whole_rows=whole_rows) == "xla"
        choose_backend("splash", like, 64, groups, whole_rows=whole_rows)

    with pytest.raises(ValueError, match="needs bfloat16, got float32"):
        ask(8, 256, 4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="6 key heads over tensor = 4"):
        ask(8, 256, 4, groups=6, mesh=(1, 2, 4))
    with pytest.raises(ValueError, match="3 rows over data x fsdp = 2 x 2"):
        ask(3, 256, 4, mesh=(2, 2, 1))
    with pytest.raises(ValueError, match="whole causal rows"):
        ask(8, 256, 4, whole_rows=False)
    q, k, v, _ = numbers(128, 2, 2, 8, jnp.bfloat16)
    with pytest.raises(ValueError, match="whole causal rows"):
        attention(q, k, v, mask_BLS=jnp.ones((1, 128, 128), bool), causal=True, backend="splash")


def test_the_decoder_takes_it_where_it_can(monkeypatch, small_config):
    """Lowered for a mesh of TPUs; a shared prefix and mixed layers need a mask instead."""
    monkeypatch.setattr(splash, "_interpret", False)
    none = small_config.replace(sliding_layers=(), sliding_window=None)
    mesh = AbstractMesh((2, 1, 2), AXES, (AxisType.Auto,) * 3, abstract_device=Described("TPU v5"))

    def text(config, **rows):
        def run(params, tokens, rows):
            return hidden_states(params, None, tokens, config=config, **rows)

        params = jax.eval_shape(lambda: init_params(jax.random.key(0), config, jnp.bfloat16))
        given = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P())),
            (params, jnp.zeros((2, 256), jnp.int32), rows),
        )
        return jax.jit(run).trace(*given).lower(lowering_platforms=("tpu",)).as_text()

    segments = {"segment_ids_BL": jnp.zeros((2, 256), jnp.int32)}
    positions = {"positions_BL": jnp.zeros((2, 256), jnp.int32)}
    prefix = {"prefix_B": jnp.zeros(2, jnp.int32)}
    some = small_config.replace(sliding_layers=(0,), sliding_window=30)
    every = small_config.replace(sliding_layers=(0, 1, 2), sliding_window=30)
    for config, rows, expected in (
        (none, {}, True),
        (none, segments | positions, True),
        (every, segments | positions, True),
        (every, positions, False),
        (some, segments | positions, False),
        (none, segments | positions | prefix, False),
    ):
        found = text(config, **rows)
        assert ("tpu_custom_call" in found) == expected
        assert ("x256x256xi1>" in found) != expected
