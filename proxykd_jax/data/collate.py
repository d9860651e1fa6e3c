"""Turns rows of tokens into the arrays of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from proxykd_jax.types import TokenBatch


@dataclass(frozen=True, slots=True)
class TokenRow:
    """An example as tokens.

    Attributes:
      tokens: int32[T]; the rendered prompt, then the last answer with its end token.
      prompt_length: P; ``tokens[P:]`` is the last answer.
      row_id: ``row_id_of(tokens, prompt_length, earlier)``, in hex.
      earlier: int32[n, 2]; begin and end of each stretch of the prompt that is in the loss too, the
        earlier turns of a row with ``turns: all``. None for none.
    """

    tokens: np.ndarray
    prompt_length: int
    row_id: str
    earlier: np.ndarray | None = None

    @property
    def prompt(self) -> np.ndarray:
        """int32[P]."""
        return self.tokens[: self.prompt_length]

    @property
    def answer(self) -> np.ndarray:
        """int32[T - P]."""
        return self.tokens[self.prompt_length :]

    @property
    def num_learnt(self) -> int:
        """Number of tokens in the loss."""
        return len(self.tokens) - self.prompt_length + count_earlier(self.earlier)

    @property
    def with_last_answer(self) -> TokenRow:
        """The row with its last answer alone in the loss."""
        return self if self.earlier is None else dataclasses.replace(self, earlier=None)


def count_earlier(earlier: np.ndarray | None) -> int:
    """Number of tokens in stretches int32[n, 2]."""
    return 0 if earlier is None else int(np.diff(earlier).sum())


def learnt_places(row: TokenRow) -> np.ndarray:
    """int64[n]: the places of the tokens in the loss, in their order."""
    stretches = [] if row.earlier is None else row.earlier.tolist()
    stretches = [*stretches, (row.prompt_length, len(row.tokens))]
    return np.concatenate([np.arange(begin, end) for begin, end in stretches])


class Rows(Protocol):
    """Interface of a split of the corpus, or of rows chosen from splits."""

    @property
    def lengths(self) -> np.ndarray:
        """int32[n], tokens of each row."""
        ...

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32[n], tokens of each prompt."""
        ...

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32[n], tokens of each prompt that are in the loss."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Reads rows by number, in the given order."""
        ...


class RowsInMemory:
    """Rows in memory, with the interface of a split.

    Args:
      rows: the rows, in order.
    """

    def __init__(self, rows: Sequence[TokenRow]) -> None:
        self._rows = list(rows)

    @property
    def lengths(self) -> np.ndarray:
        """int32[n]."""
        return np.array([len(row.tokens) for row in self._rows], np.int32)

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32[n]."""
        return np.array([row.prompt_length for row in self._rows], np.int32)

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32[n]."""
        return np.array([count_earlier(row.earlier) for row in self._rows], np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Reads rows by number, in the given order."""
        return [self._rows[index] for index in indices]


def collate_rows(
    rows: Sequence[Sequence[TokenRow]],
    length: int,
    num_segments: int,
    batch_size: int,
    answers: int | None = None,
    together: int = 1,
    *,
    share_prompt: bool = False,
) -> TokenBatch:
    """Puts examples into rows of one length.

    Args:
      rows: the examples of each row, in order. Empty rows, and rows missing at the end, become
        padding.
      length: L.
      num_segments: S.
      batch_size: B.
      answers: A; if given, the positions inside the mask are listed.
      together: number of consecutive rows that share one list: G = B / together.
      share_prompt: the examples of a row have the same prompt. Each one after the first starts with
        the prompt's last token, at its original position, and sees the rest in the first example.

    Returns:
      A ``TokenBatch`` of NumPy arrays. Examples are numbered 1..S within their row, and their
      positions start at 0. An example of T tokens takes T - 1 positions, minus what it shares.

    Raises:
      ValueError: a row's examples do not fit.
    """
    if len(rows) > batch_size:
        raise ValueError(f"{len(rows)} rows do not fit a batch of {batch_size}.")
    tokens_BL = np.zeros((batch_size, length), np.int32)
    labels_BL = np.zeros((batch_size, length), np.int32)
    mask_BL = np.zeros((batch_size, length), np.bool_)
    segment_ids_BL = np.zeros((batch_size, length), np.int32)
    positions_BL = np.zeros((batch_size, length), np.int32)
    example_mask_BS = np.zeros((batch_size, num_segments), np.bool_)
    prefix_B = np.zeros(batch_size, np.int32)
    for b, examples in enumerate(rows):
        if len(examples) > num_segments:
            raise ValueError(f"{len(examples)} examples do not fit {num_segments} places of a row.")
        begin = 0
        for s, example in enumerate(examples):
            prompt = max(example.prompt_length - 1, 0)
            skipped = prompt if share_prompt and s > 0 else 0
            end = begin + len(example.tokens) - 1 - skipped
            if end > length:
                raise ValueError(f"Examples of {end} positions do not fit a row of {length}.")
            tokens_BL[b, begin:end] = example.tokens[skipped:-1]
            labels_BL[b, begin:end] = example.tokens[skipped + 1 :]
            # Position t predicts token t + 1, so the first answer token is the label at P - 1.
            mask_BL[b, begin + prompt - skipped : end] = True
            if example.earlier is not None and not skipped:
                for first, last in example.earlier.tolist():
                    mask_BL[b, begin + max(first - 1, 0) : begin + last - 1] = True
            segment_ids_BL[b, begin:end] = s + 1
            positions_BL[b, begin:end] = np.arange(skipped, skipped + end - begin)
            example_mask_BS[b, s] = True
            prefix_B[b] = prompt
            begin = end
    places_GA = None
    if answers is not None:
        whole = together * length
        places_GA = np.full((batch_size // together, answers), whole, np.int32)
        for g, inside in enumerate(mask_BL.reshape(-1, whole)):
            places = np.flatnonzero(inside)
            if len(places) > answers:
                raise ValueError(f"{len(places)} answer tokens do not fit {answers} places.")
            places_GA[g, : len(places)] = places
    return TokenBatch(
        tokens_BL=tokens_BL,
        labels_BL=labels_BL,
        mask_BL=mask_BL,
        segment_ids_BL=segment_ids_BL,
        positions_BL=positions_BL,
        example_mask_BS=example_mask_BS,
        prefix_B=prefix_B if share_prompt else None,
        places_GA=places_GA,
    )
