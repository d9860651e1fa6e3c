"""A sampler bound to a model and a corpus: what rounds and fresh prompts draw answers with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.sampler import Prompt, Sample, sample
from proxykd_jax.generation.samples import (
    LengthBudget,
    SampleFunction,
    SampleStore,
    sample_round,
)
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.sharding import move
from proxykd_jax.training.proxy_server import serving


def draw_answers(
    store: SampleStore,
    split: Rows,
    rows: Sequence[int] | np.ndarray,
    config: Config,
    model_config: ModelConfig,
    params: Any,
    adapter: Any,
    *,
    corpus: TokenCorpus,
    mesh: Mesh,
    round_index: int,
    temperature: float,
    top_p: float,
    against_teacher: bool,
    report: Callable[[int, int], None],
) -> None:
    """Makes the answers that a store lacks, by the sampler here or by the server.

    What was moved to the mesh for sampling is free again afterwards.

    Args:
      store, split, rows, against_teacher, report: as in ``sample_round``.
      config: of the run; ``align.sampling`` says who draws, how many at once and how much.
      model_config, params, adapter: one state of the proxy.
      corpus, mesh: as in ``make_draw``.
      round_index, temperature, top_p: as in ``sample``.

    Raises:
      UserError: the server cannot be used, or the store holds other rows.
    """
    sampling = config.align.sampling
    drawn: dict[str, Any] = {
        "corpus": corpus,
        "round_index": round_index,
        "temperature": temperature,
        "top_p": top_p,
    }
    drawing: contextlib.AbstractContextManager[SampleFunction]
    if sampling.server is None:
        here: dict[str, Any] = {
            "mesh": mesh,
            "seed": config.seed,
            "batch_size": sampling.batch_size,
        }
        drawing = contextlib.nullcontext(make_draw(model_config, params, adapter, **here, **drawn))
    else:
        drawing = serving(config, model_config, params, adapter, **drawn)
    with drawing as draw:
        sample_round(
            store,
            split,
            rows,
            sample_fn=draw,
            against_teacher=against_teacher,
            rows_per_part=sampling.rows_per_part,
            budget=LengthBudget(corpus.max_length, sampling.max_new_tokens),
            end_token_ids=corpus.end_token_ids,
            report=report,
        )


class Vocabulary(Protocol):
    """What a sampler must know of the tokens: a ``TokenCorpus`` says it."""

    @property
    def vocab_size(self) -> int:
        """Ids from here on are never drawn."""
        ...

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...


def make_draw(
    config: ModelConfig,
    params: Any,
    adapter: Any,
    *,
    corpus: Vocabulary,
    mesh: Mesh,
    seed: int,
    round_index: int,
    batch_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> SampleFunction:
    """``draw(prompts, row_ids, budgets) -> samples`` from one state of the proxy.

    Args:
      config, params, adapter: the model.
      corpus: says which tokens end an answer and how many ids may be drawn.
      mesh: to which the model is moved, and over which the rows are split.
      seed, round_index, batch_size, temperature, top_p: as in ``sample``.
    """
    params, adapter = move(params, mesh), move(adapter, mesh)
    settings = DrawSettings(temperature, top_p, corpus.vocab_size, corpus.end_token_ids)

    def draw(prompts: list[np.ndarray], row_ids: list[str], budgets: list[int]) -> list[Sample]:
        return sample(
            (params, adapter),
            [Prompt(*each) for each in zip(prompts, row_ids, budgets, strict=True)],
            config=config,
            settings=settings,
            seed=seed,
            round_index=round_index,
            batch_size=batch_size,
            mesh=mesh,
        )

    return draw
