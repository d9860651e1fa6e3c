"""Models of all seeds answer prompts, score rows and give their whole distributions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.seeds import Rows, Seed, token_rows
from benchmarks.paper_tables.vectorise import in_chunks, over_seeds
from proxykd_jax.generation.decode import DrawSettings, Mixing, PromptBatch, decode, prefill
from proxykd_jax.generation.label_batch import TopKLabels, topk_soft_labels
from proxykd_jax.losses import draw_labels
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.random_keys import row_words
from proxykd_jax.types import TokenBatch


@dataclass(frozen=True)
class Answers:
    """Sampled answers of one seed.

    Attributes:
      tokens: one array per answer, with its end token if there is one.
      finished: whether there is one.
    """

    tokens: list[np.ndarray]
    finished: np.ndarray


def draw_answers(
    params: Any,
    batch: PromptBatch,
    seed: jax.Array,
    round_index: jax.Array,
    model: ModelConfig,
    temperature: float = 1.0,
    budget: int = w.MAX_ANSWER,
    other: Any = None,
    mixing: Mixing | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Answers one batch of a seed with the product's sampler, traceable.

    Returns:
      The answers ``[B, budget]``, their numbers of tokens, and whether they have an end token.
    """
    slots = batch.tokens_BL.shape[1] + budget
    settings = DrawSettings(temperature, 1.0, w.VOCAB_SIZE, (w.END,), mixing)
    weights, options = (params, None), {"config": model, "settings": settings}
    state = prefill(weights, batch, seed, round_index, other, slots=slots, **options)
    # With 0 it decodes until all rows are done.
    state = decode(weights, state, jnp.int32(0), other, **options)
    return state.tokens_BS[:, :budget], state.count_B, state.finished_B


@functools.lru_cache(maxsize=32)
def _decoder(model: ModelConfig, temperature: float, budget: int) -> Callable[..., Any]:
    def draw(salt: jax.Array, params: Any, seed: jax.Array, batch: PromptBatch) -> Any:
        return draw_answers(params, batch, seed, salt, model, temperature, budget)

    return over_seeds(draw, num_shared=1)


def prompt_batch(prompts_NP: np.ndarray, row_ids: Sequence[str], budget: int) -> PromptBatch:
    """Prompts of one length. A prompt's row id keys its random numbers."""
    words = np.stack([row_words(row_id) for row_id in row_ids])
    budgets = np.full(len(prompts_NP), budget, np.int32)
    return PromptBatch(prompts_NP, np.ones(prompts_NP.shape, bool), words, budgets)


def answer(
    model: ModelConfig,
    params_S: Any,
    prompts_SNP: Sequence[np.ndarray],
    ids_SN: Sequence[Sequence[str]],
    *,
    seeds: Sequence[int],
    salt: int,
    temperature: float = 1.0,
    budget: int = w.MAX_ANSWER,
) -> list[Answers]:
    """Answers the prompts of every seed with its model.

    Args:
      model, params_S: the model.
      prompts_SNP, ids_SN: prompts and their row ids.
      seeds, salt: what ``sample`` calls seed and round_index.
      temperature: 0 is greedy.
      budget: the number of tokens of the longest answer.
    """
    draw = _decoder(model, temperature, budget)
    seeds_S = np.asarray(seeds, np.uint32)
    batches = [
        prompt_batch(prompts, ids, budget) for prompts, ids in zip(prompts_SNP, ids_SN, strict=True)
    ]
    drawn = in_chunks(lambda part: draw(np.uint32(salt), params_S, seeds_S, part), batches)
    return [
        Answers([row[:n].astype(np.int32) for row, n in zip(tokens, count, strict=True)], finished)
        for tokens, count, finished in drawn
    ]


def answered_rows(prompts_SNP: Sequence[np.ndarray], answers: Sequence[Answers]) -> list[Rows]:
    """The answers as rows to learn from."""
    return [
        Rows(token_rows(prompts, each.tokens))
        for prompts, each in zip(prompts_SNP, answers, strict=True)
    ]


@functools.lru_cache(maxsize=32)
def _scorer(model: ModelConfig, top_k: int, temperature: float) -> Callable[..., Any]:
    def score(params: Any, batch: TokenBatch) -> Any:
        options: dict[str, Any] = {"config": model, "top_k": top_k, "temperature": temperature}
        return topk_soft_labels(params, None, batch, **options)

    return over_seeds(score)


def score(
    model: ModelConfig, params_S: Any, rows_S: Sequence[Rows], *, top_k: int, temperature: float
) -> list[TopKLabels]:
    """Soft labels at all positions of every seed's batch, ``[N + 1, L, ...]``."""
    compute = functools.partial(_scorer(model, top_k, temperature), params_S)
    return [TopKLabels(*found) for found in in_chunks(compute, [rows.batch for rows in rows_S])]


@functools.lru_cache(maxsize=8)
def _distribution(model: ModelConfig) -> Callable[..., Any]:
    def logps(params: Any, batch: TokenBatch) -> jax.Array:
        return jax.nn.log_softmax(logits_of(model, params, batch), axis=-1)

    return over_seeds(logps)


def logits_of(model: ModelConfig, params: Any, batch: TokenBatch) -> jax.Array:
    """float32 ``[B, L, V]``, traceable."""
    return unembed(params, batch_hidden_states(params, None, batch, config=model), config=model)


def distributions(model: ModelConfig, params_S: Any, rows_S: Sequence[Rows]) -> list[np.ndarray]:
    """float32 log-probs ``[N, L, V]`` of every seed's model at all positions of its rows."""
    compute = functools.partial(_distribution(model), params_S)
    return [found[:-1] for found in in_chunks(compute, [rows.batch for rows in rows_S])]


@functools.lru_cache(maxsize=8)
def _label_drawer(model: ModelConfig, num_draws: int) -> Callable[..., Any]:
    def draw(params: Any, seed: jax.Array, rows: tuple[TokenBatch, jax.Array]) -> Any:
        batch, words_B = rows
        drawn = draw_labels(
            logits_of(model, params, batch),
            jax.random.key(seed),
            num_draws=num_draws,
            row_ids_B=words_B,
        )
        return drawn.ids_BLK, jnp.log(drawn.counts_BLK / num_draws)

    return over_seeds(draw)


def drawn_labels(
    model: ModelConfig,
    params_S: Any,
    rows_S: Sequence[Rows],
    *,
    seeds: Sequence[int],
    num_draws: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Draws ids at all positions of every seed's batch: (ids, log shares) ``[N + 1, L, K]``."""
    compute = functools.partial(
        _label_drawer(model, num_draws), params_S, np.asarray(seeds, np.uint32)
    )
    asked = [
        (rows.batch, np.array([*(row_words(row_id)[0] for row_id in rows.ids), 0], np.uint32))
        for rows in rows_S
    ]
    return in_chunks(compute, asked)


@dataclass(frozen=True)
class NeuralTeacher:
    """A model of every seed is the teacher; methods see its sampled text alone.

    An answer without an end token is drawn again, so that the corpus holds whole answers, as the
    analytic teacher's does. ``MOST_TRIES`` draws have sufficed for every prompt.
    """

    params_S: Any
    seeds: Sequence[int]
    MOST_TRIES = 20

    def answers(self, *prompts_SNP: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        asked = [np.concatenate(its) for its in zip(*prompts_SNP, strict=True)]
        kept = [np.full((len(prompts), w.MAX_ANSWER), w.END, np.int32) for prompts in asked]
        waiting = [np.arange(len(prompts)) for prompts in asked]
        ids = [[str(row) for row in range(len(prompts))] for prompts in asked]
        for attempt in range(self.MOST_TRIES):
            drawn = answer(
                s.NEURAL_TEACHER, self.params_S, asked, ids, seeds=self.seeds, salt=4000 + attempt
            )
            for i, each in enumerate(drawn):
                for row in waiting[i]:
                    if each.finished[row]:
                        kept[i][row, : len(each.tokens[row])] = each.tokens[row]
                waiting[i] = waiting[i][~each.finished[waiting[i]]]
            if not any(map(len, waiting)):
                break
        else:
            raise RuntimeError("The neural teacher does not end its answers.")
        ends = np.cumsum([len(its[0]) for its in prompts_SNP])[:-1]
        parts = [np.split(answers, ends) for answers in kept]
        return [list(answers) for answers in zip(*parts, strict=True)]

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        rows_S = [
            Rows(token_rows(prompts, answers))
            for prompts, answers in zip(prompts_SNP, answers_SNT, strict=True)
        ]
        found = distributions(s.NEURAL_TEACHER, self.params_S, rows_S)
        return [x[:, w.PROMPT_LENGTH - 1 :] for x in found]


def greedy_correct(
    model: ModelConfig, params_S: Any, data: Sequence[Seed], seeds: Sequence[int]
) -> list[np.ndarray]:
    """Whether each seed's greedy answers to the test prompts end with the correct value."""
    drawn = answer(
        model,
        params_S,
        [seed.test.prompts_NP for seed in data],
        [seed.test.ids for seed in data],
        seeds=seeds,
        salt=0,
        temperature=0.0,
        # One token more than the longest answer: a model that goes on has no end and is wrong.
        budget=w.MAX_ANSWER + 1,
    )
    return [
        w.final_values(each.tokens) == w.true_results(seed.worlds.truth_FA, seed.test.prompts_NP)
        for each, seed in zip(drawn, data, strict=True)
    ]
