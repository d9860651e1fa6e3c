"""Scoring, a forward pass alone, and sampling by this library."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.speed.ours_models import device_peak, load, token_rows
from benchmarks.speed.protocol import Program, best_of
from benchmarks.speed.rows import TOP_K, Rows, mean_ids
from benchmarks.speed.shapes import compared
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.label_batch import soft_labels_of_hidden
from proxykd_jax.generation.label_rows import Positions, RowScorer
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import unembed


@functools.partial(jax.jit, static_argnames="config")
def _gold(params: Any, hidden_MD: jax.Array, labels_M: jax.Array, *, config: ModelConfig) -> Any:
    logits_MV = unembed(params, hidden_MD, config=config)
    gold_M = jnp.take_along_axis(logits_MV, labels_M[:, None], axis=-1)[:, 0]
    return gold_M - jax.nn.logsumexp(logits_MV, axis=-1)


def _scorer(task: dict[str, Any], top_k: int) -> Program:
    """Takes all rows through ``RowScorer``: soft labels, or the gold token's log-prob alone."""
    config, params, adapter = load(task)
    rows = Rows.load(task["rows"])

    def label(positions: Positions) -> Any:
        hidden, labels = positions.hidden_MD, positions.labels_M
        if top_k == 0:
            return _gold(params, hidden, labels, config=config)
        return soft_labels_of_hidden(params, hidden, labels, config=config, top_k=top_k)

    scorer = RowScorer(
        params, adapter, config, label, task["batch_size"], int(rows.lengths.max()), None
    )
    examples = token_rows(rows)

    def run() -> Any:
        return jax.block_until_ready([piece.labels for piece in scorer.dispatch(examples)])

    found = run()
    total = 0.0
    for piece, labels in zip(scorer.dispatch(examples), found, strict=True):
        gold = labels if top_k == 0 else labels.gold_logps
        total += float(np.asarray(gold)[: len(piece.offsets)].sum())
    return Program(
        run=run,
        results={"gold_logps": total / rows.answer_tokens},
        units=float(rows.answer_tokens),
        peak=device_peak(),
    )


def scoring(task: dict[str, Any]) -> Program:
    """Makes soft labels of every answer token, as the stage ``score`` does."""
    return _scorer(task, TOP_K)


def gold_forward(task: dict[str, Any]) -> Program:
    """Computes hidden states, logits and the gold token's log-softmax at the same positions."""
    return _scorer(task, 0)


def sampling(task: dict[str, Any]) -> Program:
    """Draws an answer to each prompt, as long as the row's answer.

    No token ends an answer, so every tool draws the same number of tokens.
    """
    rows = Rows.load(task["rows"])
    prompts = rows.prompts
    names = [str(index) for index in range(len(rows))]
    seeds = iter(range(1, 1 << 30))

    def draw(model: Any, batch_size: int, some: list[int], temperature: float) -> Any:
        config, params, adapter = model
        return sample(
            (params, adapter),
            [Prompt(*each) for each in zip(prompts, names, some, strict=True)],
            config=config,
            settings=DrawSettings(temperature, 1.0, config.vocab_size, ()),
            seed=next(seeds),
            round_index=0,
            batch_size=batch_size,
        )

    # Few rows are compared, so that no two logits lie within rounding of each other.
    few = task["greedy_rows"]
    some = [task["greedy_tokens"]] * few + [0] * (len(rows) - few)
    greedy = draw(load(compared(task)), few, some, 0.0)[:few]
    model = load(task)
    ways = {
        f"batch_size={size}": functools.partial(draw, model, size, rows.budgets, 1.0)
        for size in task["batch_sizes"]
    }
    run, settings = best_of(ways)
    return Program(
        run=run,
        results=mean_ids(np.array([found.tokens for found in greedy])),
        settings=settings,
        units=float(rows.answer_tokens),
        peak=device_peak(),
    )
