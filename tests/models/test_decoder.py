"""Properties of the forward passes that hold for every model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from proxykd_jax.losses import token_logps
from proxykd_jax.models import llama, lora
from proxykd_jax.models.config import LoraConfig, RopeConfig
from proxykd_jax.types import TokenBatch

forward = jax.jit(llama.forward, static_argnames="config")


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def setup(config, helpers, length=12, batch=2):
    return helpers.params(config), helpers.adapter(config), helpers.tokens(0, batch, length)


def test_nothing_depends_on_later_tokens(small_config, helpers):
    params, adapter, _ = setup(small_config, helpers, batch=1)
    position = 5

    def output(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return llama.hidden_states(changed, adapter, rows, config=small_config)[0, position].sum()

    # Every position has another token, so the gradient of an embedding row belongs to one position.
    rows = jnp.arange(12, dtype=jnp.int32)[None]
    gradient = np.asarray(jax.jit(jax.grad(output))(params["embed"]["embedding"]))[:12]
    assert (gradient[position + 1 :] == 0).all()
    assert (np.abs(gradient[: position + 1]).sum(1) > 0).all()


def test_the_window_limits_what_a_token_sees(small_config, helpers):
    config = small_config.replace(sliding_layers=(0, 1, 2), sliding_window=3)
    params = helpers.params(config)
    rows = jnp.arange(12, dtype=jnp.int32)[None]

    def output(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return llama.hidden_states(changed, None, rows, config=config)[0, -1].sum()

    gradient = np.asarray(jax.jit(jax.grad(output))(params["embed"]["embedding"]))[:12]
    # Three layers reach 3 x (3 - 1) = 6 tokens back from the last of 12.
    assert (gradient[:5] == 0).all() and (np.abs(gradient[5:]).sum(1) > 0).all()


def test_remat_changes_nothing(small_config, helpers):
    tokens_BL = helpers.tokens(0, 2, 12)
    targets = ("q_proj", "down_proj")
    config = small_config.replace(
        num_layers=2, sliding_layers=(1,), lora=LoraConfig(4, 8.0, targets=targets, dropout=0.3)
    )
    params = helpers.params(config)
    adapter = helpers.adapter(config)

    def loss(adapter, remat="none"):
        hidden_BLD = llama.hidden_states(
            params, adapter, tokens_BL, config=config, dropout_key=jax.random.key(3), remat=remat
        )
        return jnp.square(llama.unembed(params, hidden_BLD, config=config)).mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter)
    for remat in ("full", "dots", "outputs"):
        changed = jax.jit(jax.value_and_grad(functools.partial(loss, remat=remat)))
        other, other_gradient = changed(adapter)
        close(value, other, 1e-6)
        jax.tree.map(close, gradient, other_gradient)


def test_remat_names_are_checked(small_config, helpers):
    params, adapter, tokens_BL = setup(small_config, helpers)
    with pytest.raises(ValueError, match="none, full"):
        llama.hidden_states(params, adapter, tokens_BL, config=small_config, remat="most")


@pytest.mark.parametrize("sliding_layers", [(), (1, 2), (0, 1, 2)])
def test_packed_rows_equal_separate_rows(small_config, helpers, sliding_layers):
    config = small_config.replace(sliding_layers=sliding_layers)
    params, adapter, tokens_BL = setup(config, helpers, length=24, batch=1)
    bounds = [(0, 9), (9, 18), (18, 22)]  # the last two positions are padding
    segments = np.zeros((1, 24), np.int32)
    positions = np.zeros((1, 24), np.int32)
    for number, (start, stop) in enumerate(bounds, start=1):
        segments[0, start:stop] = number
        positions[0, start:stop] = np.arange(stop - start)
    packed = forward(
        params,
        adapter,
        tokens_BL,
        config=config,
        positions_BL=jnp.asarray(positions),
        segment_ids_BL=jnp.asarray(segments),
    )
    assert np.isfinite(packed).all()
    for start, stop in bounds:
        alone = forward(params, adapter, tokens_BL[:, start:stop], config=config)
        close(packed[:, start:stop], alone)


@pytest.mark.parametrize("sliding_layers", [(), (1, 2), (0, 1, 2)])
def test_a_batch_of_single_rows_needs_no_mask(small_config, helpers, sliding_layers):
    config = small_config.replace(sliding_layers=sliding_layers)
    params, adapter, tokens_BL = setup(config, helpers, length=24, batch=3)
    lengths = [24, 9, 1]
    segments = (np.arange(24)[None] < np.array(lengths)[:, None]).astype(np.int32)
    positions = np.arange(24, dtype=np.int32)[None] * segments
    batch = TokenBatch(tokens_BL, tokens_BL, segments > 0, segments, positions, segments[:, :1] > 0)
    hidden = llama.batch_hidden_states(params, adapter, batch, config=config)
    packed = batch.replace(
        example_mask_BS=np.concatenate([batch.example_mask_BS, np.zeros((3, 1), bool)], 1)
    )
    masked = llama.batch_hidden_states(params, adapter, packed, config=config)
    for row, length in enumerate(lengths):
        close(hidden[row, :length], masked[row, :length])


def test_left_padding_equals_right_padding(small_config, helpers):
    params, adapter, tokens_BL = setup(small_config, helpers, length=10, batch=1)
    options = {"config": small_config}
    alone = forward(params, adapter, tokens_BL, **options)
    padding = np.zeros((1, 4), np.int32)
    ones, index = np.ones((1, 10), np.int32), np.arange(10, dtype=np.int32)[None]
    for order in (lambda pad, row: (pad, row), lambda pad, row: (row, pad)):
        padded = forward(
            params,
            adapter,
            np.concatenate(order(padding, tokens_BL), 1),
            positions_BL=np.concatenate(order(padding, index), 1),
            segment_ids_BL=np.concatenate(order(padding, ones), 1),
            **options,
        )
        close(padded[:, 4:] if order(0, 1) == (0, 1) else padded[:, :10], alone)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("family", ["small", "plain"])
def test_cached_equals_uncached(small_config, helpers, family, apart):
    """Prefill with left padding, then single tokens; valid_BL skips a row that has ended.

    Layers are stacked, or each has its own cache.
    """
    config = small_config
    if family == "plain":
        config = small_config.replace(sliding_layers=(), rope=RopeConfig(kind="linear", factor=2.0))
    params, adapter, tokens_BL = setup(config, helpers, length=15, batch=3)
    prefill, lengths = 9, [9, 4, 1]
    valid_BL = np.arange(15)[None, :] >= prefill - np.asarray(lengths)[:, None]
    positions_BL = np.maximum(np.cumsum(valid_BL, 1) - 1, 0).astype(np.int32)
    expected = llama.hidden_states(
        params,
        adapter,
        tokens_BL,
        config=config,
        positions_BL=positions_BL,
        segment_ids_BL=valid_BL.astype(np.int32),
    )
    step = jax.jit(llama.forward_cached, static_argnames="config")
    cache = llama.init_cache(config, 3, 20, jnp.float32)
    if apart:
        cache = cache.replace(
            k_NBGSC=llama.unstack_layers(cache.k_NBGSC), v_NBGSC=llama.unstack_layers(cache.v_NBGSC)
        )
        params, adapter = (
            {**tree, "layers": llama.unstack_layers(tree["layers"])} for tree in (params, adapter)
        )
    outputs = []
    for start, stop in [(0, prefill), *((i, i + 1) for i in range(prefill, 15))]:
        part = slice(start, stop)
        hidden_BLD, cache = step(
            params,
            adapter,
            tokens_BL[:, part],
            cache,
            config=config,
            positions_BL=positions_BL[:, part],
            valid_BL=valid_BL[:, part],
        )
        outputs.append(hidden_BLD)
    assert int(cache.index) == 15
    assert (np.asarray(cache.positions_BS[:, :15]) == np.where(valid_BL, positions_BL, -1)).all()
    assert (np.asarray(cache.positions_BS[:, 15:]) == -1).all()
    outputs = np.concatenate(outputs, 1)
    assert np.isfinite(outputs).all()
    close(outputs[valid_BL], np.asarray(expected)[valid_BL])


def test_an_ended_row_leaves_the_others_alone(small_config, helpers):
    params, adapter, tokens_BL = setup(small_config, helpers, length=8)
    positions_BL = np.tile(np.arange(8, dtype=np.int32), (2, 1))
    caches = llama.init_cache(small_config, 2, 8, jnp.float32)
    valid_BL = np.ones((2, 8), bool)
    valid_BL[1, 5:] = False
    options = {"config": small_config, "positions_BL": positions_BL}
    ended, _ = llama.forward_cached(
        params, adapter, tokens_BL, caches, valid_BL=valid_BL, **options
    )
    both, _ = llama.forward_cached(params, adapter, tokens_BL, caches, **options)
    close(ended[0], both[0], 0)
    close(ended[1, :5], both[1, :5], 0)


def test_a_cache_that_is_too_small_is_refused(small_config, helpers):
    params, _, tokens_BL = setup(small_config, helpers)
    cache = llama.init_cache(small_config, 2, 11, jnp.float32)
    positions_BL = np.zeros((2, 12), np.int32)
    with pytest.raises(ValueError, match="11 slots"):
        llama.forward_cached(
            params, None, tokens_BL, cache, config=small_config, positions_BL=positions_BL
        )


def test_gradients_of_full_training_in_bfloat16(small_config, helpers):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), helpers.params(small_config))
    tokens_BL = helpers.tokens(0, 2, 12)

    def loss(params):
        logits = llama.forward(params, None, tokens_BL, config=small_config, remat="full")
        return jax.nn.logsumexp(logits, axis=-1).mean()

    gradient = jax.jit(jax.grad(loss))(params)
    for leaf, weight in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True):
        assert leaf.dtype == weight.dtype
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_a_token_outside_the_vocabulary_is_not_read_as_another(small_config, helpers):
    params, _, tokens_BL = setup(small_config, helpers)
    tokens_BL[0, 3] = small_config.vocab_size
    hidden = np.asarray(llama.hidden_states(params, None, tokens_BL, config=small_config))
    assert np.isnan(hidden[0, 3]).all() and np.isfinite(hidden[1]).all()


def test_shapes_that_do_not_fit_are_refused(small_config, helpers):
    params, adapter, tokens_BL = setup(small_config, helpers)
    wrong = np.zeros((2, 5), np.int32)
    for options in ({"positions_BL": wrong}, {"segment_ids_BL": wrong}):
        with pytest.raises(ValueError, match="shape"):
            llama.hidden_states(params, adapter, tokens_BL, config=small_config, **options)
    with pytest.raises(ValueError, match="two axes"):
        llama.hidden_states(params, adapter, tokens_BL[0], config=small_config)
    with pytest.raises(ValueError, match="lora"):
        llama.hidden_states(params, adapter, tokens_BL, config=small_config.replace(lora=None))


def test_abstract_and_initial_parameters_agree(small_config):
    made = jax.eval_shape(lambda key: llama.init_params(key, small_config), jax.random.key(0))
    assert made == llama.abstract_params(small_config)
    made = jax.eval_shape(lambda key: lora.init_adapter(key, small_config), jax.random.key(0))
    assert made == lora.abstract_adapter(small_config)
    counted = sum(leaf.size for leaf in jax.tree.leaves(llama.abstract_params(small_config)))
    assert counted == small_config.num_params
    drawn = llama.init_params(jax.random.key(0), small_config.replace(vocab_size=5000))
    assert abs(float(drawn["embed"]["embedding"].std()) / 0.02 - 1) < 0.02
    assert (np.asarray(drawn["layers"]["input_norm"]["scale"]) == 1).all()


@pytest.mark.parametrize("chunk, tie_embeddings", [(5, True), (1, False)])
def test_log_probs_by_chunks_equal_a_gather(small_config, helpers, chunk, tie_embeddings):
    config = small_config.replace(
        num_layers=1,
        sliding_layers=(),
        tie_embeddings=tie_embeddings,
        lora=LoraConfig(4, 8.0, targets=("v_proj",)),
    )
    params, adapter, tokens_BL = setup(config, helpers)
    labels_BL = helpers.tokens(1, 2, 12)
    weights = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)

    def whole(adapter):
        logits = llama.forward(params, adapter, tokens_BL, config=config)
        logps = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(logps, labels_BL[..., None], axis=-1)[..., 0]
        return (weights * chosen).sum(), chosen

    def chunked(adapter):
        hidden_BLD = llama.hidden_states(params, adapter, tokens_BL, config=config)
        logps = llama.map_positions(
            lambda hidden, labels: token_logps(
                llama.unembed(params, hidden, config=config), labels
            ),
            hidden_BLD,
            labels_BL,
            chunk=chunk,
        )
        return (weights * logps).sum(), logps

    gradient, expected = jax.jit(jax.grad(whole, has_aux=True))(adapter)
    other_gradient, logps = jax.jit(jax.grad(chunked, has_aux=True))(adapter)
    close(logps, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), gradient, other_gradient)


def test_chunks_are_at_least_one_position(small_config, helpers):
    with pytest.raises(ValueError, match="chunk"):
        llama.map_positions(lambda x: x, jnp.zeros((2, 3)), chunk=0)
