"""Decoding on the device: draws a token per row and runs it through the cache, until rows are done.

A token's random key depends only on (seed, round, row id, position in the answer). So batches,
padding, order of work and resumption cannot change what is drawn, except through rounding: programs
of different shapes may give logits that differ in the last bits. That matters only where two
tokens' perturbed logits are that close.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from proxykd_jax.losses import draw_ids, mixture_logps
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.llama import KVCache, forward_cached, init_cache, unembed, unstack_layers
from proxykd_jax.parallel.sharding import CACHE, ROWS, constrain
from proxykd_jax.random_keys import row_keys

# Fields of a state that hold caches.
_CACHES = ("cache", "other_cache")
# Fields with an entry per slot of the caches.
_BY_SLOT = ("tokens_BS", "logps_BS")


@dataclass(frozen=True)
class Mixing:
    """Draws from share x another model + (1 - share) x the first model; static under jit.

    Attributes:
      config: the other model's shapes; both models use the same token ids.
      share: weight of its probabilities, 0 to 1.
    """

    config: ModelConfig
    share: float


@dataclass(frozen=True)
class DrawSettings:
    """How a token is drawn; static under jit.

    Attributes:
      temperature: 0 is greedy.
      top_p: draw from the smallest set of tokens whose probability (at the temperature) reaches
        this; ties go to the lower id. 1 keeps all tokens.
      vocab_size: larger or equal ids are never drawn (rows of the embedding without a token).
      end_token_ids: tokens that end an answer.
      mixing: another model to draw from as well, or None. Log-probs are then the mixture's.

    Raises:
      ValueError: a value is out of range.
    """

    temperature: float
    top_p: float
    vocab_size: int
    end_token_ids: tuple[int, ...]
    mixing: Mixing | None = None

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.vocab_size >= 1):
            raise ValueError(
                f"Out of range: temperature {self.temperature} (at least 0), top_p {self.top_p} "
                f"(in (0, 1]) or vocab_size {self.vocab_size} (at least 1)."
            )


@flax.struct.dataclass
class DecodeState:
    """B rows in the middle of decoding, all after the same number of steps.

    The caches have S slots, which may be too few for the longest answer. Decoding stops at the last
    slot, and ``move_rows`` adds more.

    Attributes:
      cache: keys and values of prompts and answers so far.
      other_cache: cache of the model that is mixed in, or None.
      step: int32 scalar, tokens drawn so far in each row that is not done.
      token_B: int32, the last token drawn.
      done_B: bool, ended or out of budget.
      finished_B: bool, an end token was drawn.
      count_B: int32, tokens of the answer.
      tokens_BS, logps_BS: the answer and the log-probs of its tokens; zero from ``count_B`` on.
      row_keys_B: random keys.
      budgets_B: int32, most tokens per row; 0 for padding rows.
      prompt_lengths_B: int32.
    """

    cache: KVCache
    other_cache: KVCache | None
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
    """Prompts, padded on the left so that they end together.

    Attributes:
      tokens_BL: int32, ``valid_BL``: bool.
      row_words_BW: uint32, digests of the row ids.
      budgets_B: int32; 0 for a padding row.
    """

    tokens_BL: Any
    valid_BL: Any
    row_words_BW: Any
    budgets_B: Any


def draw_tokens(
    logits_BV: jax.Array, keys_B: jax.Array, settings: DrawSettings
) -> tuple[jax.Array, jax.Array]:
    """Draws one token per row (``losses.draw_ids``), or takes the most probable one.

    Args:
      logits_BV: float32.
      keys_B: one random key per row.
      settings: see ``DrawSettings``.

    Returns:
      ``token_B`` int32 and ``logp_B`` float32. The log-prob is taken at temperature 1 under the
      softmax over all V entries, whatever was excluded from the draw, because that is what the
      training forward pass computes.
    """
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    scores_BV = logits_BV
    if settings.vocab_size < logits_BV.shape[-1]:  # on a CPU this comparison costs more than a draw
        scores_BV = jnp.where(ids_BV < settings.vocab_size, logits_BV, -jnp.inf)
    if settings.temperature > 0:
        scores_BV = scores_BV / settings.temperature
        if settings.top_p < 1:
            scores_BV = jnp.where(nucleus(scores_BV, settings.top_p), scores_BV, -jnp.inf)
        token_B = jax.vmap(lambda scores_V, key: draw_ids(scores_V, key, 1)[0])(scores_BV, keys_B)
    else:
        # The argmax as two plain reductions. XLA's argmax takes four times as long on a CPU, where
        # it was 40 % of a decoding step (15M parameters, 32 rows, 32,000 tokens).
        best_BV = scores_BV == jnp.max(scores_BV, axis=-1, keepdims=True)
        token_B = jnp.min(jnp.where(best_BV, ids_BV, logits_BV.shape[-1]), axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1, mode="clip")[:, 0]
    return token_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def nucleus(scores_BV: jax.Array, top_p: float) -> jax.Array:
    """bool ``[B, V]``: the smallest set of tokens whose probability reaches ``top_p``.

    The set always contains the most probable token. Among equal probabilities lower ids come first.
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


@functools.partial(jax.jit, static_argnames=("config", "slots", "settings", "unstacked"))
def prefill(
    weights: tuple[Any, Any],
    batch: PromptBatch,
    seed: jax.Array,
    round_index: jax.Array,
    other: tuple[Any, Any] | None = None,
    *,
    config: ModelConfig,
    slots: int,
    settings: DrawSettings,
    unstacked: bool = False,
) -> DecodeState:
    """Runs the prompts through the model and draws the first token of each row.

    ``weights`` are (params, adapter) of the model, and ``other`` those of the model that
    ``settings.mixing`` describes. With ``unstacked``, each layer of the caches has its own arrays,
    and ``decode`` unrolls the layers instead of scanning them. On one CPU device that is twice as
    fast, and compiling takes longer by the number of layers.
    """
    mixing = settings.mixing
    num_rows = batch.tokens_BL.shape[0]
    positions_BL = jnp.cumsum(batch.valid_BL, axis=1, dtype=jnp.int32) - 1

    def empty(params: Any, config: ModelConfig) -> KVCache:
        return init_cache(config, num_rows, slots, params["embed"]["embedding"].dtype)

    logits_BV, cache, other_cache = _next_logits(
        weights,
        other,
        batch.tokens_BL,
        empty(weights[0], config),
        None if mixing is None or other is None else empty(other[0], mixing.config),
        config=config,
        mixing=mixing,
        positions_BL=positions_BL,
        valid_BL=batch.valid_BL,
    )
    if unstacked:
        cache = _of_cache(cache, unstack_layers)
        other_cache = None if other_cache is None else _of_cache(other_cache, unstack_layers)
    zeros_B = jnp.zeros(num_rows, jnp.int32)
    state = DecodeState(
        cache=cache,
        other_cache=other_cache,
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
    return _constrain(_record(logits_BV, state, settings), like=logits_BV)


def _next_logits(
    weights: tuple[Any, Any],
    other: tuple[Any, Any] | None,
    tokens_BL: jax.Array,
    cache: KVCache,
    other_cache: KVCache | None,
    *,
    config: ModelConfig,
    mixing: Mixing | None,
    **places: Any,
) -> tuple[jax.Array, KVCache, KVCache | None]:
    """Logits of the token after each row's last one, and the caches with the new tokens.

    With mixing these are the mixture's log-probs.
    """

    def logits(
        weights: tuple[Any, Any], cache: KVCache, config: ModelConfig
    ) -> tuple[jax.Array, KVCache]:
        hidden_BLD, cache = forward_cached(*weights, tokens_BL, cache, config=config, **places)
        return unembed(weights[0], hidden_BLD[:, -1], config=config), cache

    logits_BV, cache = logits(weights, cache, config)
    if mixing is None or other is None or other_cache is None:
        return logits_BV, cache, None
    other_BV, other_cache = logits(other, other_cache, mixing.config)
    # Entries that exist in only one of the two vocabularies stand for no token.
    most = min(logits_BV.shape[-1], other_BV.shape[-1])
    logps_BV, other_logps_BV = (jax.nn.log_softmax(x[:, :most]) for x in (logits_BV, other_BV))
    mixed_BV = mixture_logps(other_logps_BV, logps_BV, scorer_share=mixing.share)
    return mixed_BV, cache, other_cache


def _of_cache(cache: KVCache, change: Callable[[Any], Any]) -> KVCache:
    """The cache after applying ``change`` to its keys and values."""
    return dataclasses.replace(cache, k_NBGSC=change(cache.k_NBGSC), v_NBGSC=change(cache.v_NBGSC))


def decode_specs(state: DecodeState) -> DecodeState:
    """The PartitionSpec of each array of a state (or of its shapes)."""
    specs = jax.tree.map(lambda x: ROWS if x.ndim else PartitionSpec(), state)

    def of_cache(name: str) -> Any:
        cache = getattr(state, name)
        if cache is None:
            return None
        one = PartitionSpec(*CACHE[1:])
        spec = (one,) * len(cache.k_NBGSC) if cache.is_unstacked else CACHE
        return _of_cache(getattr(specs, name), lambda _: spec)

    return dataclasses.replace(specs, **{name: of_cache(name) for name in _CACHES})


def _constrain(state: DecodeState, like: jax.Array) -> DecodeState:
    return jax.tree.map(lambda x, spec: constrain(x, spec, like=like), state, decode_specs(state))


@functools.partial(jax.jit, static_argnames=("config", "settings"), donate_argnames=("state",))
def decode(
    weights: tuple[Any, Any],
    state: DecodeState,
    few: jax.Array,
    other: tuple[Any, Any] | None = None,
    *,
    config: ModelConfig,
    settings: DrawSettings,
) -> DecodeState:
    """Decodes until at most ``few`` rows (int32 scalar) are not done, or all slots are filled.

    If the caches' layers are unstacked, pass weights (and ``other``) from ``unstack_weights``.
    """
    num_slots = state.cache.positions_BS.shape[1]

    def go_on(state: DecodeState) -> jax.Array:
        wanted = jnp.sum(~state.done_B, dtype=jnp.int32) > few
        return wanted & (state.cache.index < num_slots)

    def step(state: DecodeState) -> DecodeState:
        positions_B = state.prompt_lengths_B + state.step - 1
        logits_BV, cache, other_cache = _next_logits(
            weights,
            other,
            state.token_B[:, None],
            state.cache,
            state.other_cache,
            config=config,
            mixing=settings.mixing,
            positions_BL=positions_B[:, None],
            valid_BL=~state.done_B[:, None],
        )
        state = dataclasses.replace(state, cache=cache, other_cache=other_cache)
        return _record(logits_BV, state, settings)

    return jax.lax.while_loop(go_on, step, state)


@functools.partial(jax.jit, static_argnames="config")
def unstack_weights(params: Any, adapter: Any, *, config: ModelConfig) -> tuple[Any, Any]:
    """The weights in the form that ``decode`` needs when the caches' layers are unstacked.

    Each layer has its own arrays. Tied embeddings also get a transposed copy as a projection [D,
    V]: otherwise a product with few rows would transpose them at every token (9.8 instead of 8.3 ms
    with 32 rows of 288 and 32,000 entries, 5.2 instead of 3.7 with 8 rows).
    """
    params, adapter = (
        tree if tree is None else {**tree, "layers": unstack_layers(tree["layers"])}
        for tree in (params, adapter)
    )
    if config.tie_embeddings:
        params = {**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}
    return params, adapter


@functools.partial(jax.jit, static_argnames=("filled", "slots"))
def join_rows(
    states: tuple[DecodeState, ...], rows_B: jax.Array, *, filled: int, slots: int
) -> DecodeState:
    """Joins rows of several states that have run their prompts and nothing more.

    Args:
      states: with layers unstacked, and caches as long as their prompts.
      rows_B: int32 indices into the rows of all states together, in the wanted order; a negative
        index stands for a padding row, which is done.
      filled: slots of the new caches that hold prompts, at least the longest prompt's tokens.
      slots: slots of the new caches.
    """

    def padded(array: jax.Array, axis: int, before: int, fill: int = 0) -> jax.Array:
        """Adds ``before`` entries in front (or cuts them off) and pads to ``slots`` in all."""
        after = slots - before - array.shape[axis]
        widths = [(0, 0, 0)] * array.ndim
        widths[axis] = (before, after, 0)
        return jax.lax.pad(array, jnp.asarray(fill, array.dtype), widths)

    def of_cache(cache: KVCache) -> KVCache:
        before = filled - cache.positions_BS.shape[1]  # prompts end at the same slot
        moved = _of_cache(cache, lambda layers: tuple(padded(x, 2, before) for x in layers))
        positions_BS = padded(cache.positions_BS, 1, before, -1)
        return dataclasses.replace(moved, positions_BS=positions_BS, index=jnp.int32(filled))

    def of_state(state: DecodeState) -> DecodeState:
        other = state.other_cache
        changed: dict[str, Any] = {name: padded(getattr(state, name), 1, 0) for name in _BY_SLOT}
        changed["cache"] = of_cache(state.cache)
        changed["other_cache"] = None if other is None else of_cache(other)
        return dataclasses.replace(state, **changed)

    def together(*arrays: jax.Array) -> jax.Array:
        # The scalars are the step and the caches' index, which are equal in all states.
        return jnp.concatenate(arrays) if arrays[0].ndim else arrays[0]

    state: DecodeState = jax.tree.map(together, *(of_state(state) for state in states))
    state = move_rows(state, jnp.maximum(rows_B, 0), slots=slots)
    return dataclasses.replace(state, done_B=state.done_B | (rows_B < 0))


@functools.partial(jax.jit, static_argnames="slots")
def move_rows(state: DecodeState, rows_B: jax.Array, *, slots: int) -> DecodeState:
    """The state of some rows (int32 indices), in the given order, with at least as many slots."""
    more = slots - state.cache.positions_BS.shape[1]

    def wider(array: jax.Array, axis: int, fill: int = 0) -> jax.Array:
        widths = [(0, more if place == axis else 0) for place in range(array.ndim)]
        return jnp.pad(array, widths, constant_values=fill)

    def of_cache(cache: KVCache | None) -> KVCache | None:
        if cache is None:
            return None
        rows_axis = 0 if cache.is_unstacked else 1

        def moved(array: jax.Array) -> jax.Array:
            return wider(jnp.take(array, rows_B, axis=rows_axis, mode="clip"), rows_axis + 2)

        cache = _of_cache(cache, lambda arrays: jax.tree.map(moved, arrays))
        return dataclasses.replace(cache, positions_BS=wider(cache.positions_BS[rows_B], 1, -1))

    def of_field(name: str) -> Any:
        value = getattr(state, name)
        if name in _CACHES:
            return of_cache(value)
        return wider(value[rows_B], 1) if name in _BY_SLOT else value[rows_B]

    names = [name for name in state.__dataclass_fields__ if name != "step"]
    state = dataclasses.replace(state, **{name: of_field(name) for name in names})
    return _constrain(state, like=state.token_B)
