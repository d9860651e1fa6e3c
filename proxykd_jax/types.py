"""Batches that flow from the data to the training steps.

Axes: B rows, L positions, S examples in a row (1 unless rows are packed), G groups of rows, A
places of answers, K stored log-probs.
Position t of every ``_BL`` array speaks of the same prediction: ``tokens_BL[:, t]`` is read,
``labels_BL[:, t]`` is the token after it, ``mask_BL[:, t]`` says whether that token is part of an
answer.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import flax.struct

# numpy in the data stream, jax in the steps; tracers of jit in between.
Array: TypeAlias = Any


@flax.struct.dataclass
class TokenBatch:
    """Rows of tokens with their shifted labels.

    Attributes:
      tokens_BL: int32 inputs; 0 where padded.
      labels_BL: int32 next tokens; 0 where padded.
      mask_BL: bool, the label is a token of an answer (end token included).
      segment_ids_BL: int32, 0 = padding, 1..S = the example that a position belongs to.
      positions_BL: int32 position within the example, from 0.
      example_mask_BS: bool, which of the S places of a row hold an example. A batch that the data
        do not fill has rows of padding, so that its shape stays the same.
      prefix_B: int32, how many first positions of a row every example of it sees: the beginning
        of a prompt that they share. None: each sees itself alone.
      places_GA: int32, for each group of B / G rows that lie side by side the positions inside
        ``mask_BL``, counted through all of its rows, in order, then B / G times L: the vocabulary
        is projected at these alone. None projects it everywhere.
    """

    tokens_BL: Array
    labels_BL: Array
    mask_BL: Array
    segment_ids_BL: Array
    positions_BL: Array
    example_mask_BS: Array
    prefix_B: Array | None = None
    places_GA: Array | None = None


@flax.struct.dataclass
class PairBatch:
    """Rows for eq. 6: the teacher's answer beside the proxy's own.

    Attributes:
      chosen, rejected: one example a row (S = 1); row b of both has the same prompt.
      reference_chosen_B, reference_rejected_B: float32 summed log-probs under the proxy of the
        round's start.
      pair_mask_B: bool, the row has a usable y-hat. Its NLL counts either way.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    reference_chosen_B: Array
    reference_rejected_B: Array
    pair_mask_B: Array


@flax.struct.dataclass
class SharedPairBatch:
    """``PairBatch`` with both answers in one row, so that their prompt is computed once.

    Attributes:
      rows: S = 2: example 1 is the prompt with y; example 2 sees the prompt but for its last token,
        of which it begins with a copy, and goes on with y-hat.
      reference_chosen_B, reference_rejected_B, pair_mask_B: as in ``PairBatch``.
    """

    rows: TokenBatch
    reference_chosen_B: Array
    reference_rejected_B: Array
    pair_mask_B: Array

    @property
    def chosen(self) -> TokenBatch:
        """The rows with the tokens of y inside the mask."""
        return self._of_example(1)

    @property
    def rejected(self) -> TokenBatch:
        """The rows with the tokens of y-hat inside the mask."""
        return self._of_example(2)

    def _of_example(self, number: int) -> TokenBatch:
        inside_BL = self.rows.mask_BL & (self.rows.segment_ids_BL == number)
        rows: TokenBatch = self.rows.replace(mask_BL=inside_BL)  # type: ignore[attr-defined]
        return rows


Pairs: TypeAlias = PairBatch | SharedPairBatch


@flax.struct.dataclass
class DistillBatch:
    """Rows for eq. 11.

    Attributes:
      rows: the tokens.
      topk_ids_BLK: int32 ids of the proxy's most probable tokens.
      topk_logps_BLK: float32 log-probs of the full softmax at these ids.
      tail_logps_BL: float32 log of the probability outside them.
      sample_weight_BS: float32 w(x, y) of eq. 9.
      nll_mask_BS: bool, the answer is the teacher's (a fresh prompt's is not: no NLL).
    """

    rows: TokenBatch
    topk_ids_BLK: Array
    topk_logps_BLK: Array
    tail_logps_BL: Array
    sample_weight_BS: Array
    nll_mask_BS: Array
