"""Batches that flow from the data to the training steps.

Axes: B rows, L positions, S examples per row (1 unless rows are packed), G groups of rows,
A positions of answers, K stored log-probs.
Position t of every ``_BL`` array belongs to the same prediction: ``tokens_BL[:, t]`` is the input,
``labels_BL[:, t]`` the next token, and ``mask_BL[:, t]`` says whether that token belongs to an
answer.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import flax.struct

# NumPy arrays in the data stream, jax arrays in the steps, tracers under jit.
Array: TypeAlias = Any


@flax.struct.dataclass
class TokenBatch:
    """Rows of tokens with their shifted labels.

    Attributes:
      tokens_BL: int32 inputs; 0 for padding.
      labels_BL: int32 next tokens; 0 for padding.
      mask_BL: bool, True if the label is a token of an answer (including its end token).
      segment_ids_BL: int32, the example that a position belongs to, 1 to S; 0 for padding.
      positions_BL: int32 position within the example, from 0.
      example_mask_BS: bool, True for the places of a row that hold an example. A batch that is not
        full gets padding rows, so that its shape stays the same.
      prefix_B: int32, number of first positions of a row that all of its examples see: the
        beginning of a prompt that they share. None: each example sees only itself.
      places_GA: int32, positions inside ``mask_BL`` for each group of B / G consecutive rows,
        ascending, counted through all rows of the group; unused entries are B / G times L. The
        vocabulary is projected only at these. None: it is projected everywhere.
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
    """Rows for eq. 6: the teacher's answer and the proxy's own.

    Attributes:
      chosen, rejected: one example per row (S = 1); row b of both has the same prompt.
      reference_chosen_B, reference_rejected_B: float32 summed log-probs under the proxy at the
        start of the round.
      pair_mask_B: bool, True if the row has a usable y-hat. The NLL of y counts in either case.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    reference_chosen_B: Array
    reference_rejected_B: Array
    pair_mask_B: Array


@flax.struct.dataclass
class SharedPairBatch:
    """``PairBatch`` with both answers in one row, so that their prompt is computed only once.

    Attributes:
      rows: S = 2. Example 1 is the prompt with y. Example 2 sees the prompt except its last token,
        starts with a copy of that token, and continues with y-hat.
      reference_chosen_B, reference_rejected_B, pair_mask_B: as in ``PairBatch``.
    """

    rows: TokenBatch
    reference_chosen_B: Array
    reference_rejected_B: Array
    pair_mask_B: Array

    @property
    def chosen(self) -> TokenBatch:
        """The rows with only the tokens of y inside the mask."""
        return self._of_example(1)

    @property
    def rejected(self) -> TokenBatch:
        """The rows with only the tokens of y-hat inside the mask."""
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
      topk_logps_BLK: float32 log-probs of these ids under the full softmax.
      tail_logps_BL: float32 log of the probability outside them.
      sample_weight_BS: float32 w(x, y) of eq. 9.
      nll_mask_BS: bool, True if the answer is the teacher's. Fresh prompts have no such answer, and
        no NLL.
    """

    rows: TokenBatch
    topk_ids_BLK: Array
    topk_logps_BLK: Array
    tail_logps_BL: Array
    sample_weight_BS: Array
    nll_mask_BS: Array
