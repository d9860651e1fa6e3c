"""Batches of the pairs of eq. 6: the teacher's answers and the proxy's own answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from proxykd_jax.config import PreferenceConfig
from proxykd_jax.data.collate import Rows, TokenRow, collate_rows
from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.generation.samples import KEPT, SampledRow, SampleStore
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.operations import sharing_pays
from proxykd_jax.training.batches import LastAnswers, answer_positions
from proxykd_jax.types import PairBatch, Pairs, SharedPairBatch


def shares_prompt(
    preference: PreferenceConfig,
    model: ModelConfig,
    prompts: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
) -> bool:
    """Returns whether both answers of a pair share one row behind their common prompt.

    They never do with dynamic rope scaling, which depends on the length of a row.

    Args:
      preference, model: of the run; ``auto`` chooses the layout that makes a step cheaper.
      prompts, chosen, rejected: integer[n], tokens of each pair's parts.
    """
    if not may_share_prompt(preference, model):
        return False
    return preference.share_prompt is True or sharing_pays(model, prompts, chosen, rejected)


def may_share_prompt(preference: PreferenceConfig, model: ModelConfig) -> bool:
    """Returns whether both answers may share a row, whatever their lengths."""
    return preference.share_prompt is not False and model.rope.kind != "dynamic"


class PairRows:
    """Rows with the y-hat of each: place i of ``samples`` belongs to place i of ``rows``.

    Args:
      rows: prompts with y.
      samples: y-hat. Reference log-probs are read once, at construction.
      preference, model: see ``shares_prompt``.

    Attributes:
      share_prompt: True if both answers stand in one row behind their prompt, which is computed
        once. Otherwise each answer has a row with the prompt, as long as the longer one needs.
      positions: integer[n], positions that each pair takes.
      mean_tokens: mean number of tokens of a pair's two answers together.
      answers: integer[n], positions inside the mask, whose label is an answer's token.
    """

    def __init__(
        self, rows: Rows, samples: SampleStore, preference: PreferenceConfig, model: ModelConfig
    ) -> None:
        rows = LastAnswers(rows)  # the sample is drawn for the last turn
        self._rows, self._samples = rows, samples
        self._references = samples.references()
        answers = rows.lengths - rows.prompt_lengths
        own = np.where(samples.drops == KEPT, samples.lengths, 0)
        lengths = (rows.prompt_lengths, answers, own)
        self.share_prompt = shares_prompt(preference, model, *lengths)
        self.mean_tokens = float(np.mean(answers + own)) if len(answers) else 0.0
        chosen = answer_positions(rows)
        rejected = np.where(samples.drops == KEPT, chosen + own - answers, 0)
        self.answers = pair_answers(chosen, rejected, share_prompt=self.share_prompt)
        self.positions = rows.lengths - 1 - chosen + self.answers

    def longest(self, max_length: int) -> int:
        """Returns the most tokens of a row, in a corpus whose rows have up to ``max_length``."""
        return 2 * max_length if self.share_prompt else max_length

    def collate(self, planned: PlannedBatch) -> Pairs:
        """Returns the arrays of a planned batch."""
        places = [row[0] for row in planned.rows if row]
        found = zip(self._rows.read(places), self._samples.read(places), strict=True)
        return collate_pairs(
            [_pair(row, sample) for row, sample in found],
            planned,
            self._references,
            share_prompt=self.share_prompt,
        )


def pair_answers(chosen: np.ndarray, rejected: np.ndarray, *, share_prompt: bool) -> np.ndarray:
    """Returns integer[n], masked positions of a pair's row, from those of its two answers."""
    return chosen + rejected if share_prompt else np.maximum(chosen, rejected)


def collate_pairs(
    pairs: Sequence[tuple[TokenRow, TokenRow | None]],
    planned: PlannedBatch,
    references: tuple[np.ndarray, np.ndarray],
    *,
    share_prompt: bool,
) -> Pairs:
    """Collates pairs into the arrays of a batch.

    Args:
      pairs: for each row that is not padding, the prompt with y and the same prompt with y-hat, or
        None if y-hat is not usable.
      planned: the batch.
      references: two float32[n], log-probs of y and of y-hat by place.
      share_prompt: see ``PairRows``.
    """
    given = iter(pairs)
    both = [list(next(given)) if row else [None, None] for row in planned.rows]
    chosen, rejected = ([[row] if row else [] for row in side] for side in zip(*both, strict=True))
    places = [row[0] if row else None for row in planned.rows]
    reference_chosen_B, reference_rejected_B = (
        np.array([0.0 if place is None else of[place] for place in places], np.float32)
        for of in references
    )
    rest: dict[str, Any] = {
        "reference_chosen_B": reference_chosen_B,
        "reference_rejected_B": reference_rejected_B,
        "pair_mask_B": np.array([bool(row) for row in rejected]),
    }
    count, counted = len(planned.rows), (planned.answers, planned.together)
    if share_prompt:
        rows = [first + second for first, second in zip(chosen, rejected, strict=True)]
        size = (planned.length, 2, count, *counted)
        return SharedPairBatch(collate_rows(rows, *size, share_prompt=True), **rest)
    size = (planned.length, 1, count, *counted)
    return PairBatch(collate_rows(chosen, *size), collate_rows(rejected, *size), **rest)


def _pair(row: TokenRow, sample: SampledRow) -> tuple[TokenRow, TokenRow | None]:
    if sample.drop != KEPT:
        return row, None
    if sample.row_id != row.row_id:
        raise ValueError(f"the sample of row {row.row_id} is of row {sample.row_id}")
    tokens = np.concatenate([row.prompt, sample.tokens])
    return row, TokenRow(tokens, row.prompt_length, sample.row_id)
