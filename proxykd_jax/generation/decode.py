"""Decoding on the device: draw a token a row, run it through the cache, until rows are done.

The random key of a token is folded from (seed, round, row id, place in the answer) alone, and a
row's key never meets another row. So batch, padding, order of work and resumption cannot change
what is drawn, but for rounding: two programs of different shape may give logits that differ in
the last bits, which matters where two tokens' perturbed logits lie within those bits.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.llama import KVCache, forward_cached, init_cache, unembed
from proxykd_jax.parallel.sharding import CACHE, ROWS, constrain

# Fixed, so that a changed default of the random generator cannot change samples.
_KEY_IMPLEMENTATION = "threefry2x32"


@dataclass(frozen=True)
class DrawSettings:
    """How a token is drawn from logits; static under jit.

    Attributes:
      temperature: 0 is greedy.
      top_p: the smallest set of tokens whose probability (at the temperature) reaches it is
        drawn from; ties go to the lower id. 1 leaves all.
      vocab_size: ids from here on are never drawn (rows of the embedding without a token).
      end_token_ids: tokens that end an answer.
    """

    temperature: float
    top_p: float
    vocab_size: int
    end_token_ids: tuple[int, ...]


@flax.struct.dataclass
class DecodeState:
    """B rows in the middle of decoding. All have seen the same number of steps.

    Attributes:
      cache: keys and values of prompts and answers so far.
      step: int32 scalar, tokens drawn so far by a row that is not done.
      token_B: int32, the last token drawn.
      done_B: bool, ended or at its budget.
      finished_B: bool, an end token was drawn.
      count_B: int32, tokens of the answer.
      tokens_BS, logps_BS: the answer and the log-probs of its tokens; zero from ``count_B`` on.
      row_keys_B: random keys.
      budgets_B: int32, the most tokens of a row; 0 for rows of padding.
      prompt_lengths_B: int32.
    """

    cache: KVCache
    step: jax.Array
    token_B: jax.Array
    done_B: jax.Array
    finished_B: jax.Array
    count_B: jax.Array
    tokens_BS: jax.Array
    logps_BS: jax.Array
    row_keys_B: jax.Array
    budgets_B: jax.Array
    prompt_lengths_B: jax.Array


@flax.struct.dataclass
class PromptBatch:
    """Prompts, padded on the left so that their ends align.

    Attributes:
      tokens_BL: int32, ``valid_BL``: bool.
      row_words_BW: uint32, the row ids' digests.
      budgets_B: int32; 0 for a row of padding.
    """

    tokens_BL: Any
    valid_BL: Any
    row_words_BW: Any
    budgets_B: Any


def row_keys(seed: jax.Array, round_index: jax.Array, row_words_BW: jax.Array) -> jax.Array:
    """Random keys of rows, ``[B]``."""
    key = jax.random.key(seed, impl=_KEY_IMPLEMENTATION)
    key = jax.random.fold_in(key, round_index)

    def fold(words_W: jax.Array) -> jax.Array:
        row_key = key
        for index in range(words_W.shape[0]):
            row_key = jax.random.fold_in(row_key, words_W[index])
        return row_key

    return jax.vmap(fold)(row_words_BW)


def draw_tokens(
    logits_BV: jax.Array, keys_B: jax.Array, settings: DrawSettings
) -> tuple[jax.Array, jax.Array]:
    """Draws one token a row by Gumbel-max.

    Args:
      logits_BV: float32.
      keys_B: a random key a row.
      settings: see ``DrawSettings``.

    Returns:
      ``token_B`` int32, and ``logp_B`` float32: its log-prob at temperature 1 under the softmax
      over all V entries, which is what the training forward computes, whatever was left out of
      the draw.
    """
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    scores_BV = jnp.where(ids_BV < settings.vocab_size, logits_BV, -jnp.inf)
    if settings.temperature > 0:
        scores_BV = scores_BV / settings.temperature
        if settings.top_p < 1:
            scores_BV = jnp.where(nucleus(scores_BV, settings.top_p), scores_BV, -jnp.inf)
        size = logits_BV.shape[1:]
        scores_BV = scores_BV + jax.vmap(lambda key: jax.random.gumbel(key, size))(keys_B)
    # The argmax as two plain reductions: XLA's own takes four times as long on a CPU, where it
    # was 40 % of a decoding step (15M parameters, 32 rows, 32,000 tokens).
    best_BV = scores_BV == jnp.max(scores_BV, axis=-1, keepdims=True)
    token_B = jnp.min(jnp.where(best_BV, ids_BV, logits_BV.shape[-1]), axis=-1)
    # A sum over a comparison keeps a vocabulary that is spread over devices where it is.
    chosen_B = jnp.sum(jnp.where(ids_BV == token_B[:, None], logits_BV, 0.0), axis=-1)
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def nucleus(scores_BV: jax.Array, top_p: float) -> jax.Array:
    """Which tokens belong to the smallest set whose probability reaches ``top_p``, bool ``[B, V]``.

    The most probable token always does; of equally probable ones the lower id comes first.
    """
    order_BV = jnp.argsort(-scores_BV, axis=-1, stable=True)
    probs_BV = jax.nn.softmax(jnp.take_along_axis(scores_BV, order_BV, axis=-1), axis=-1)
    before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
    kept_BV = (before_BV < top_p).at[:, 0].set(True)
    return jnp.put_along_axis(jnp.zeros_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)


def _record(logits_BV: jax.Array, state: DecodeState, settings: DrawSettings) -> DecodeState:
    """Draws the next token of every row that is not done."""
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state.row_keys_B, state.step)
    token_B, logp_B = draw_tokens(logits_BV, keys_B, settings)
    active_B = ~state.done_B
    token_B, logp_B = jnp.where(active_B, token_B, 0), jnp.where(active_B, logp_B, 0.0)
    ended_B = jnp.zeros_like(active_B)
    for end_token_id in settings.end_token_ids:
        ended_B |= active_B & (token_B == end_token_id)
    count_B = state.count_B + active_B
    place = (jnp.zeros((), jnp.int32), state.step)
    return dataclasses.replace(
        state,
        step=state.step + 1,
        token_B=token_B,
        done_B=state.done_B | ended_B | (count_B >= state.budgets_B),
        finished_B=state.finished_B | ended_B,
        count_B=count_B,
        tokens_BS=jax.lax.dynamic_update_slice(state.tokens_BS, token_B[:, None], place),
        logps_BS=jax.lax.dynamic_update_slice(state.logps_BS, logp_B[:, None], place),
    )


@functools.partial(jax.jit, static_argnames=("config", "slots", "settings"))
def prefill(
    params: Any,
    adapter: Any,
    batch: PromptBatch,
    seed: jax.Array,
    round_index: jax.Array,
    *,
    config: ModelConfig,
    slots: int,
    settings: DrawSettings,
) -> DecodeState:
    """Runs the prompts through the model and draws the first token of each row."""
    num_rows, length = batch.tokens_BL.shape
    cache_dtype = params["embed"]["embedding"].dtype
    positions_BL = jnp.cumsum(batch.valid_BL, axis=1, dtype=jnp.int32) - 1
    hidden_BLD, cache = forward_cached(
        params,
        adapter,
        batch.tokens_BL,
        init_cache(config, num_rows, slots, cache_dtype),
        config=config,
        positions_BL=positions_BL,
        valid_BL=batch.valid_BL,
    )
    logits_BV = unembed(params, hidden_BLD[:, length - 1], config=config)
    zeros_B = jnp.zeros(num_rows, jnp.int32)
    state = DecodeState(
        cache=cache,
        step=jnp.zeros((), jnp.int32),
        token_B=zeros_B,
        done_B=batch.budgets_B <= 0,
        finished_B=zeros_B.astype(bool),
        count_B=zeros_B,
        tokens_BS=jnp.zeros((num_rows, slots), jnp.int32),
        logps_BS=jnp.zeros((num_rows, slots), jnp.float32),
        row_keys_B=row_keys(seed, round_index, batch.row_words_BW),
        budgets_B=batch.budgets_B,
        prompt_lengths_B=batch.valid_BL.sum(axis=1, dtype=jnp.int32),
    )
    return _constrain(_record(logits_BV, state, settings), like=hidden_BLD)


def decode_specs(state: DecodeState) -> DecodeState:
    """The PartitionSpec of every array of a state (or of its shapes)."""
    specs = jax.tree.map(lambda x: ROWS if x.ndim else PartitionSpec(), state)
    cache = dataclasses.replace(specs.cache, k_NBGSC=CACHE, v_NBGSC=CACHE, positions_BS=ROWS)
    return dataclasses.replace(specs, cache=cache)


def _constrain(state: DecodeState, like: jax.Array) -> DecodeState:
    return jax.tree.map(lambda x, spec: constrain(x, spec, like=like), state, decode_specs(state))


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnames=("state",))
def decode(
    params: Any,
    adapter: Any,
    state: DecodeState,
    few: jax.Array,
    *,
    config: ModelConfig,
    settings: DrawSettings,
) -> DecodeState:
    """Goes on until at most ``few`` rows (int32 scalar) are not done."""

    def go_on(state: DecodeState) -> jax.Array:
        return jnp.sum(~state.done_B, dtype=jnp.int32) > few

    def step(state: DecodeState) -> DecodeState:
        positions_B = state.prompt_lengths_B + state.step - 1
        hidden_BLD, cache = forward_cached(
            params,
            adapter,
            state.token_B[:, None],
            state.cache,
            config=config,
            positions_BL=positions_B[:, None],
            valid_BL=~state.done_B[:, None],
        )
        logits_BV = unembed(params, hidden_BLD[:, 0], config=config)
        return _record(logits_BV, dataclasses.replace(state, cache=cache), settings)

    return jax.lax.while_loop(go_on, step, state)


@jax.jit
def take_rows(state: DecodeState, rows_B: jax.Array) -> DecodeState:
    """The state of some rows (int32 indices), in the order given."""
    cache = state.cache
    rest = {
        name: getattr(state, name)[rows_B]
        for name in state.__dataclass_fields__
        if name not in ("cache", "step")
    }
    taken = dataclasses.replace(
        state,
        cache=dataclasses.replace(
            cache,
            k_NBGSC=cache.k_NBGSC[:, rows_B],
            v_NBGSC=cache.v_NBGSC[:, rows_B],
            positions_BS=cache.positions_BS[rows_B],
        ),
        **rest,
    )
    return _constrain(taken, like=state.token_B)
