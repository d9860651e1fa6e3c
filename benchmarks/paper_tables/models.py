"""What models of all seeds do: answer prompts, score rows, give whole distributions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import settings as s
from benchmarks.paper_tables.seeds import Rows, Seed, token_rows
from benchmarks.paper_tables.vectorise import over_seeds, stack
from proxykd_jax.data.collate import TokenRow
from proxykd_jax.generation.decode import DrawSettings, PromptBatch, decode, prefill
from proxykd_jax.generation.label_batch import topk_soft_labels
from proxykd_jax.losses import draw_labels
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.random_keys import row_words
from proxykd_jax.types import TokenBatch

CHUNK = 256  # rows computed at once: one program serves splits of every size
_FEW = 0  # decode until every row is done


@dataclass(frozen=True)
class Answers:
    """Sampled answers of one seed.

    Attributes:
      tokens: one array an answer, its end token included where it has one.
      finished: whether it has.
    """

    tokens: list[np.ndarray]
    finished: np.ndarray


@dataclass(frozen=True)
class Labels:
    """Soft labels of one seed at all places of a batch, ``[N, L, ...]``."""

    ids_NLK: np.ndarray
    logps_NLK: np.ndarray
    gold_NL: np.ndarray
    tail_NL: np.ndarray


@functools.lru_cache(maxsize=32)
def _decoder(model: ModelConfig, temperature: float, budget: int) -> Callable[..., Any]:
    settings = DrawSettings(temperature, 1.0, w.VOCAB_SIZE, (w.END,))

    def draw(salt: jax.Array, params: Any, seed: jax.Array, batch: PromptBatch) -> Any:
        state = draw_answers(params, batch, seed, salt, model, settings, budget)
        return state.tokens_BS[:, :budget], state.count_B, state.finished_B

    return over_seeds(draw, num_shared=1)


def draw_answers(
    params: Any,
    batch: PromptBatch,
    seed: jax.Array,
    round_index: jax.Array,
    model: ModelConfig,
    settings: DrawSettings,
    budget: int,
    other: Any = None,
) -> Any:
    """The product's sampler on one batch of a seed, traceable: the state when all rows are done."""
    slots = batch.tokens_BL.shape[1] + budget
    weights, options = (params, None), {"config": model, "settings": settings}
    state = prefill(weights, batch, seed, round_index, other, slots=slots, **options)
    return decode(weights, state, jnp.int32(_FEW), other, **options)


def prompt_batch(prompts_NP: np.ndarray, row_ids: Sequence[str], budget: int) -> PromptBatch:
    """Prompts of one length; a prompt's row id keys its random numbers."""
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
    """Answers of every seed's model to its prompts.

    Args:
      model, params_S: the model.
      prompts_SNP, ids_SN: prompts and their row ids, as many as a seed has.
      seeds, salt: what ``sample`` calls seed and round_index.
      temperature: 0 is greedy.
      budget: tokens of the longest answer.
    """
    draw = _decoder(model, temperature, budget)
    batches = [
        prompt_batch(prompts, ids, budget) for prompts, ids in zip(prompts_SNP, ids_SN, strict=True)
    ]
    seeds_S = np.asarray(seeds, np.uint32)
    found: list[list[Any]] = [[] for _ in seeds]
    for part in chunks(batches):
        for i, piece in enumerate(
            zip(*map(np.asarray, draw(np.uint32(salt), params_S, seeds_S, part)), strict=True)
        ):
            found[i].append(piece)
    answers = []
    for pieces, prompts in zip(found, prompts_SNP, strict=True):
        tokens, count, finished = (
            np.concatenate(x)[: len(prompts)] for x in zip(*pieces, strict=True)
        )
        cut = [row[:n].astype(np.int32) for row, n in zip(tokens, count, strict=True)]
        answers.append(Answers(cut, finished))
    return answers


def answered_rows(prompts_SNP: Sequence[np.ndarray], answers: Sequence[Answers]) -> list[Rows]:
    """The answers as rows to learn from."""
    return [
        Rows.of(token_rows(prompts, each.tokens))
        for prompts, each in zip(prompts_SNP, answers, strict=True)
    ]


@functools.lru_cache(maxsize=32)
def _scorer(model: ModelConfig, top_k: int, temperature: float) -> Callable[..., Any]:
    def score(params: Any, batch: TokenBatch) -> Any:
        options: dict[str, Any] = {"config": model, "top_k": top_k, "temperature": temperature}
        return topk_soft_labels(params, None, batch, **options)

    return over_seeds(score)


def score(
    model: ModelConfig,
    params_S: Any,
    rows_S: Sequence[Rows],
    *,
    top_k: int,
    temperature: float = 1.0,
) -> list[Labels]:
    """Soft labels of every seed's rows, as ``score`` stores them."""
    compute = _scorer(model, top_k, temperature)
    pieces = [
        [np.asarray(x) for x in compute(params_S, part)]
        for part in chunks([rows.batch for rows in rows_S])
    ]
    return [
        Labels(
            *(
                np.concatenate([piece[k][i] for piece in pieces])[: len(rows.rows) + 1]
                for k in range(4)
            )
        )
        for i, rows in enumerate(rows_S)
    ]


@functools.lru_cache(maxsize=8)
def _distribution(model: ModelConfig) -> Callable[..., Any]:
    def logps(params: Any, batch: TokenBatch) -> jax.Array:
        return jax.nn.log_softmax(logits_of(model, params, batch), axis=-1)

    return over_seeds(logps)


def logits_of(model: ModelConfig, params: Any, batch: TokenBatch) -> jax.Array:
    """float32 ``[B, L, V]``, traceable."""
    return unembed(params, batch_hidden_states(params, None, batch, config=model), config=model)


def distributions(model: ModelConfig, params_S: Any, rows_S: Sequence[Rows]) -> list[np.ndarray]:
    """float32 log-probs ``[N, L, V]`` of every seed's model at all places of its rows."""
    compute = _distribution(model)
    pieces = [np.asarray(compute(params_S, part)) for part in chunks([r.batch for r in rows_S])]
    return [
        np.concatenate([piece[i] for piece in pieces])[: len(rows.rows)]
        for i, rows in enumerate(rows_S)
    ]


@functools.lru_cache(maxsize=8)
def _label_drawer(model: ModelConfig, num_draws: int) -> Callable[..., Any]:
    def draw(params: Any, seed: jax.Array, batch: TokenBatch, words_B: jax.Array) -> Any:
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
    """(ids, log shares) ``[N + 1, L, num_draws]`` of ids drawn at all places of every seed's rows.

    The last row is padding.
    """
    draw = _label_drawer(model, num_draws)
    seeds_S = np.asarray(seeds, np.uint32)
    asked = [
        (rows.batch, np.array([*(row_words(row_id)[0] for row_id in rows.ids), 0], np.uint32))
        for rows in rows_S
    ]
    pieces = [[np.asarray(x) for x in draw(params_S, seeds_S, *part)] for part in chunks(asked)]
    found = []
    for i, rows in enumerate(rows_S):
        ids, shares = (
            np.concatenate([piece[k][i] for piece in pieces])[: len(rows.rows) + 1] for k in (0, 1)
        )
        found.append((ids, shares))
    return found


def chunks(trees: list[Any]) -> Iterator[Any]:
    """Stacked parts of ``CHUNK`` rows; what a seed lacks repeats its last row."""
    sizes = [jax.tree.leaves(tree)[0].shape[0] for tree in trees]
    for start in range(0, max(sizes), CHUNK):
        places = [np.minimum(np.arange(start, start + CHUNK), size - 1) for size in sizes]
        yield stack(
            [
                jax.tree.map(lambda x, at=at: np.asarray(x)[at], tree)
                for tree, at in zip(trees, places, strict=True)
            ]
        )


@dataclass(frozen=True)
class NeuralTeacher:
    """A model of every seed as the teacher; others see its sampled text alone.

    An answer without an end token within the budget is drawn again, so that the corpus holds
    whole answers, as the analytic teacher's does; ``MOST_TRIES`` draws fail for none in practice.
    """

    params_S: Any
    seeds: Sequence[int]
    MOST_TRIES = 20

    def answers(self, prompts_SNP: Sequence[np.ndarray], salt: int) -> list[np.ndarray]:
        kept = [np.full((len(prompts), w.MAX_ANSWER), w.END, np.int32) for prompts in prompts_SNP]
        waiting = [np.arange(len(prompts)) for prompts in prompts_SNP]
        ids = [[str(row) for row in range(len(prompts))] for prompts in prompts_SNP]
        for attempt in range(self.MOST_TRIES):
            drawn = answer(
                s.NEURAL_TEACHER,
                self.params_S,
                prompts_SNP,
                ids,
                seeds=self.seeds,
                salt=1000 * salt + attempt,
            )
            for i, each in enumerate(drawn):
                for row in waiting[i]:
                    if each.finished[row]:
                        kept[i][row, : len(each.tokens[row])] = each.tokens[row]
                waiting[i] = waiting[i][~each.finished[waiting[i]]]
            if not any(map(len, waiting)):
                return kept
        raise RuntimeError("the neural teacher does not end its answers")

    def logps(
        self, prompts_SNP: Sequence[np.ndarray], answers_SNT: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        rows = [
            Rows.of(
                [
                    TokenRow(np.concatenate(pair).astype(np.int32), w.PROMPT_LENGTH, "")
                    for pair in zip(prompts, answers, strict=True)
                ]
            )
            for prompts, answers in zip(prompts_SNP, answers_SNT, strict=True)
        ]
        first = w.PROMPT_LENGTH - 1
        return [x[:, first:] for x in distributions(s.NEURAL_TEACHER, self.params_S, rows)]


def greedy_correct(
    model: ModelConfig, params_S: Any, data: Sequence[Seed], seeds: Sequence[int]
) -> list[np.ndarray]:
    """Whether each seed's greedy answers to the test prompts end with the correct value."""
    prompts = [seed.test.prompts_NP for seed in data]
    drawn = answer(
        model,
        params_S,
        prompts,
        [seed.test.ids for seed in data],
        seeds=seeds,
        salt=0,
        temperature=0.0,
        # One token more than the longest answer: a model that rambles has no end and is wrong.
        budget=w.MAX_ANSWER + 1,
    )
    return [
        w.final_values(each.tokens) == w.true_results(seed.worlds.truth_FA, seed.test.prompts_NP)
        for each, seed in zip(drawn, data, strict=True)
    ]
