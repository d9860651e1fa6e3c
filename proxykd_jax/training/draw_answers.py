"""Drawing the answers of rounds, fresh prompts and benchmarks from one state of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
from proxykd_jax.training.state import Weights


@dataclass(frozen=True)
class Answerer:
    """One state of a model that answers prompts, by the built-in sampler or by a server.

    Attributes:
      config: config of the run; ``align.sampling`` gives the server, the batch size and the limits.
      corpus: the corpus; its vocabulary and end tokens are used.
      model: the architecture.
      weights: (params, adapter).
      mesh: mesh of the built-in sampler. Weights moved there are freed after the draw.
    """

    config: Config
    corpus: TokenCorpus
    model: ModelConfig
    weights: Weights
    mesh: Mesh

    def fill(
        self,
        store: SampleStore,
        split: Rows,
        rows: Sequence[int] | np.ndarray,
        *,
        round_index: int,
        temperature: float,
        top_p: float = 1.0,
        against_teacher: bool,
        report: Callable[[int, int, int], None],
    ) -> None:
        """Draws the answers that a store lacks.

        Args:
          store, split, rows, against_teacher, report: as in ``sample_round``.
          round_index, temperature, top_p: as in ``sample``.

        Raises:
          UserError: the server cannot be used, or the store holds other rows.
        """
        sampling, corpus = self.config.align.sampling, self.corpus
        settings = DrawSettings(temperature, top_p, corpus.vocab_size, corpus.end_token_ids)
        drawing: contextlib.AbstractContextManager[SampleFunction]
        if sampling.server is None:
            drawing = contextlib.nullcontext(
                make_draw(
                    self.model,
                    self.weights,
                    settings,
                    mesh=self.mesh,
                    seed=self.config.seed,
                    round_index=round_index,
                    batch_size=sampling.batch_size,
                )
            )
        else:
            drawing = serving(
                self.config,
                self.model,
                self.weights,
                settings,
                corpus=corpus,
                round_index=round_index,
            )
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


def make_draw(
    config: ModelConfig,
    weights: Weights,
    settings: DrawSettings,
    *,
    mesh: Mesh,
    seed: int,
    round_index: int,
    batch_size: int,
) -> SampleFunction:
    """Returns ``draw(prompts, row_ids, budgets) -> samples`` of one state of a model.

    Args:
      config: the architecture.
      weights: (params, adapter).
      settings, seed, round_index, batch_size: as in ``sample``.
      mesh: mesh that the model is moved to and the rows are split over.
    """
    moved = (move(weights[0], mesh), move(weights[1], mesh))

    def draw(prompts: list[np.ndarray], row_ids: list[str], budgets: list[int]) -> list[Sample]:
        return sample(
            moved,
            [Prompt(*each) for each in zip(prompts, row_ids, budgets, strict=True)],
            config=config,
            settings=settings,
            seed=seed,
            round_index=round_index,
            batch_size=batch_size,
            mesh=mesh,
        )

    return draw
