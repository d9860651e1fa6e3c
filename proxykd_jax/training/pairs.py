"""Pairs of eq. 6 as batches: the teacher's answers beside the proxy's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from proxykd_jax.config import PreferenceConfig
from proxykd_jax.data.collate import Rows, TokenRow, collate_rows
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.generation.samples import KEPT, SampledRow, SampleStore
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.types import PairBatch, Pairs, SharedPairBatch


def shares_prompt(preference: PreferenceConfig, model: ModelConfig) -> bool:
    """Whether both answers of a pair stand in one row.

    Not under dynamic rope scaling, which is a function of the length of a row.
    """
    return preference.share_prompt and model.rope.kind != "dynamic"


class PairRows:
    """Rows with the y-hat of each: place i of ``samples`` belongs to place i of ``rows``.

    Args:
      rows: prompts with y.
      samples: y-hat. The reference log-probs are those that it has by now.
      share_prompt: both answers stand in one row behind their prompt, which is computed once;
        else each has a row with the prompt, as long as the longer of both needs.

    Attributes:
      positions: integer[n], places that each pair takes.
      answers: integer[n], places of these, inside the mask, whose label is a token of an answer.
    """

    def __init__(self, rows: Rows, samples: SampleStore, *, share_prompt: bool) -> None:
        self._rows, self._samples, self._share_prompt = rows, samples, share_prompt
        self._references = samples.references()
        before = np.maximum(rows.prompt_lengths, 1) - 1  # positions before the first of an answer
        kept = samples.drops == KEPT
        chosen = rows.lengths - 1 - before
        rejected = np.where(kept, rows.prompt_lengths + samples.lengths - 1 - before, 0)
        self.answers = chosen + rejected if share_prompt else np.maximum(chosen, rejected)
        self.positions = before + self.answers

    def longest(self, max_length: int) -> int:
        """Tokens that the longest row may stand for, in a corpus of rows of so many."""
        return 2 * max_length if self._share_prompt else max_length

    def collate(self, planned: PlannedBatch) -> Pairs:
        """The arrays of a planned batch."""
        places = [row[0] if row else None for row in planned.rows]
        there = [place for place in places if place is not None]
        found = zip(self._rows.read(there), self._samples.read(there), strict=True)
        pairs = [None if place is None else _pair(*next(found)) for place in places]
        reference_chosen_B, reference_rejected_B = (
            np.array([0.0 if p is None else values[p] for p in places], np.float32)
            for values in self._references
        )
        return collate_pairs(
            pairs,
            planned,
            reference_chosen_B=reference_chosen_B,
            reference_rejected_B=reference_rejected_B,
            share_prompt=self._share_prompt,
        )


def collate_pairs(
    pairs: list[tuple[TokenRow, TokenRow | None] | None],
    planned: PlannedBatch,
    *,
    reference_chosen_B: np.ndarray,
    reference_rejected_B: np.ndarray,
    share_prompt: bool,
) -> Pairs:
    """Pairs as the arrays of a batch.

    Args:
      pairs: of each row the prompt with y and the same prompt with y-hat, which is None where
        none is usable; None is a row of padding.
      planned: the batch's sizes.
      reference_chosen_B, reference_rejected_B: float32 log-probs of both answers.
      share_prompt: see ``PairRows``.
    """
    chosen = [[] if pair is None else [pair[0]] for pair in pairs]
    rejected = [[] if pair is None or pair[1] is None else [pair[1]] for pair in pairs]
    rest: dict[str, Any] = {
        "reference_chosen_B": reference_chosen_B,
        "reference_rejected_B": reference_rejected_B,
        "pair_mask_B": np.array([bool(row) for row in rejected]),
    }
    if share_prompt:
        both = [first + second for first, second in zip(chosen, rejected, strict=True)]
        size = (planned.length, 2, len(pairs), planned.answers)
        return SharedPairBatch(collate_rows(both, *size, share_prompt=True), **rest)
    size = (planned.length, 1, len(pairs), planned.answers)
    return PairBatch(collate_rows(chosen, *size), collate_rows(rejected, *size), **rest)


def _pair(row: TokenRow, sample: SampledRow) -> tuple[TokenRow, TokenRow | None]:
    if sample.drop != KEPT:
        return row, None
    if sample.row_id != row.row_id:
        raise ValueError(f"the sample of row {row.row_id} is of row {sample.row_id}")
    tokens = np.concatenate([row.prompt, sample.tokens])
    return row, TokenRow(tokens, row.prompt_length, sample.row_id)
