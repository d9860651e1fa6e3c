"""Answers that the student gives during training, as batches.

An answer is a function of (seed, step, row, answer's number) and of the student at that step. It
does not change in a resumed run, with another order of rows, or with another number of processes.
Prompts are padded on the left for sampling, and rows on the right for training. A truncated answer
has no end token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.struct
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.data.collate import Rows, TokenRow, collate_rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.order import PlannedBatch, default_buckets
from proxykd_jax.generation.decode import DrawSettings, Mixing
from proxykd_jax.generation.sampler import Prompt, sample
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.losses import Term, count_tokens, reduce_examples
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.sharding import check_rows, move, tree_shardings
from proxykd_jax.random_keys import purpose_seed, raw_bits
from proxykd_jax.training.batch_objectives import Metrics
from proxykd_jax.training.model import Model
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import Weights
from proxykd_jax.types import TokenBatch

# The rows of a step by their place in its batch; None at places that the data do not fill.
Places = Sequence[TokenRow | None]


@dataclass(frozen=True)
class Answer:
    """A prompt with an answer.

    Attributes:
      row: tokens of both; ``row_id`` is that of the row with the prompt.
      finished: whether the answer has an end token.
      sampled: whether the student gave the answer.
    """

    row: TokenRow
    finished: bool
    sampled: bool


@flax.struct.dataclass
class AnswerBatch:
    """Answers to train on, one per row.

    Attributes:
      rows: the tokens.
      finished_B, sampled_B: bool, as in ``Answer``.
    """

    rows: TokenBatch
    finished_B: Any
    sampled_B: Any


@dataclass(frozen=True)
class Answering:
    """How the student answers.

    Attributes:
      model_config: the student's architecture.
      method: section that limits an answer's length and the answers decoded together.
      corpus: the corpus; gives the end tokens, the number of ids and the longest row.
      mesh: mesh that draws. The weights are moved there for a draw and freed after it.
      seed: seed of the run.
      temperature: temperature of sampling.
      per_prompt: answers per prompt.
      mixing: another model that tokens are also drawn from.

    Raises:
      UserError: a batch cannot be split over the mesh.
    """

    model_config: ModelConfig
    method: AnsweringSection
    corpus: TokenCorpus
    mesh: Mesh
    seed: int
    temperature: float
    per_prompt: int = 1
    mixing: Mixing | None = None

    @staticmethod
    def of(
        run: StageRun, method: AnsweringSection, temperature: float, per_prompt: int = 1
    ) -> Answering:
        """Returns how the student of a run answers.

        Raises:
          UserError: the mesh that draws does not fit the student or the batch.
        """
        tree_shardings((run.model.frozen, run.model.trainable), run.sample_mesh)
        return Answering(
            run.model.config,
            method,
            run.corpus,
            run.sample_mesh,
            run.config.seed,
            temperature,
            per_prompt,
        )

    def __post_init__(self) -> None:
        check_rows(self.method.sample_batch_size, self.mesh, "method.sample_batch_size")

    def answer(
        self,
        student: Model,
        places: Places,
        step: int,
        other: Weights | None = None,
    ) -> list[Answer | None]:
        """Returns ``per_prompt`` answers for each place, in a sequence.

        Args:
          student: the student, on any mesh of the same devices.
          places: rows whose prompts are answered; their own answers are ignored.
          step: step of the phase; the same step draws the same answers.
          other: (params, adapter) of the model that is mixed in.
        """
        asked = [row for row in places if row is not None for _ in range(self.per_prompt)]
        numbers = [number for row in places if row is not None for number in range(self.per_prompt)]
        budget = LengthBudget(self.corpus.max_length, self.method.max_new_tokens)
        ends, vocab_size = self.corpus.end_token_ids, self.corpus.vocab_size
        drawn = sample(
            move(student.weights, self.mesh),
            [
                Prompt(row.prompt, f"{row.row_id}/student/{n}", budget.after(row.prompt_length))
                for row, n in zip(asked, numbers, strict=True)
            ],
            config=self.model_config,
            settings=DrawSettings(self.temperature, 1.0, vocab_size, ends, self.mixing),
            seed=self.seed,
            round_index=step,
            batch_size=self.method.sample_batch_size,
            mesh=self.mesh,
            other=None if other is None else move(other, self.mesh),
        )
        found = iter(
            Answer(
                TokenRow(np.concatenate([row.prompt, s.tokens]), row.prompt_length, row.row_id),
                s.finished,
                True,
            )
            for row, s in zip(asked, drawn, strict=True)
        )
        return [
            None if row is None else next(found) for row in places for _ in range(self.per_prompt)
        ]


def student_answers(seed: int, step: int, share: float) -> bool:
    """Returns whether the student answers the batch of a step: u < share, with u of (seed, step).

    With share 0 it never does, with share 1 always.
    """
    (bits,) = raw_bits(1, seed=purpose_seed(seed, "distill/who_answers"), index=step)
    return int(bits) >> 11 < share * 2.0**53


def read_places(rows: Rows, planned: PlannedBatch) -> list[TokenRow | None]:
    """Reads the rows of a planned batch, one for each place."""
    found = iter(rows.read([row[0] for row in planned.rows if row]))
    return [next(found) if row else None for row in planned.rows]


def given_answers(places: Places, end_token_ids: Sequence[int]) -> list[Answer | None]:
    """Returns rows with their own last answers."""

    def answer(row: TokenRow) -> Answer:
        ends = len(row.answer) > 0 and int(row.answer[-1]) in end_token_ids
        return Answer(row.with_last_answer, ends, False)

    return [None if row is None else answer(row) for row in places]


def answer_batch(answers: Sequence[Answer | None], max_length: int, extra: int = 0) -> AnswerBatch:
    """Collates one answer per row, as NumPy arrays.

    Rows without an answer and answers without a token count nowhere.

    Args:
      answers: B answers.
      max_length: tokens of the longest row that the corpus may hold.
      extra: positions that each row has in addition to those of its tokens.
    """
    rows = [None if answer is None else answer.row for answer in answers]
    most = max((len(row.tokens) - 1 + extra for row in rows if row is not None), default=1)
    buckets = default_buckets(max_length + extra)
    length = int(buckets[np.searchsorted(buckets, most)])
    return AnswerBatch(
        rows=collate_rows([[] if row is None else [row] for row in rows], length, 1, len(rows)),
        finished_B=np.array([a is not None and a.finished for a in answers], bool),
        sampled_B=np.array([a is not None and a.sampled for a in answers], bool),
    )


def answer_figures(batch: AnswerBatch) -> Metrics:
    """Returns the mean tokens of an answer, and the shares that ended and that the student gave."""
    tokens_B = count_tokens(batch.rows.mask_BL)
    there_B = tokens_B > 0
    return {
        "answer_tokens": Term(tokens_B.sum(), there_B.sum(dtype=tokens_B.dtype)),
        "finished": reduce_examples(batch.finished_B, there_B),
        "student_share": reduce_examples(batch.sampled_B, there_B),
    }
