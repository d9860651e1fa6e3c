"""``corpus.max_rows``: which rows of a larger corpus stay.

Among the rows that fit ``max_length``, those with the smallest hashes stay. So as many rows
stay as were asked for, whatever the order of the files. Only rows that may still be among them are
tokenised: about ``max_rows`` times the logarithm of (corpus size / ``max_rows``).
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

import numpy as np

from proxykd_jax.config import SourceConfig
from proxykd_jax.texts.records import TextRow
from proxykd_jax.texts.split import selection_hash
from proxykd_jax.texts.template import Renderer

TOO_LONG = "longer than max_length"
NO_ROOM = "its prompt leaves no room for an answer"
_BATCH_ROWS = 512


def length_problem(tokens: int, prompt_length: int, max_length: int) -> str | None:
    """Why a row of this length is dropped, or None. Cutting would leave answers without an end."""
    if prompt_length >= max_length:
        return NO_ROOM
    return TOO_LONG if tokens > max_length else None


def threshold_of(smallest: Sequence[int], max_rows: int) -> int:
    """A threshold; at most ``max_rows`` rows that fit have hashes below it.

    Args:
      smallest: the ``max_rows + 1`` smallest hashes of rows that fit, or all if there are fewer.
      max_rows: most rows to keep.
    """
    return max(smallest) if len(smallest) > max_rows else 1 << 64


def below_threshold(hashes: np.ndarray, threshold: int) -> np.ndarray:
    """bool[n]: which of these hashes (uint64[n]) belong to rows to keep."""
    return np.ones(len(hashes), bool) if threshold == 1 << 64 else hashes < np.uint64(threshold)


class RowLimit:
    """Sees the rows of a corpus one by one, then decides which stay.

    Args:
      max_rows: most rows to keep.
      max_length: tokens of the longest row that fits.
      renderer: turns text into tokens.
    """

    def __init__(self, max_rows: int, max_length: int, renderer: Renderer) -> None:
        self._max_rows, self._max_length, self._renderer = max_rows, max_length, renderer
        self._hashes = array("Q")
        # The max_rows + 1 smallest hashes of rows that fit, negated: the largest is on top.
        self._smallest: list[int] = []
        self._waiting: list[tuple[int, TextRow]] = []
        self._source: SourceConfig | None = None

    def add(self, row: TextRow, source: SourceConfig) -> None:
        """Adds the next row, which belongs to this source.

        Raises:
          UserError: it is a conversation and there is no template.
        """
        number = selection_hash(row)
        self._hashes.append(number)
        if number >= self._threshold():
            return
        if source != self._source or len(self._waiting) == _BATCH_ROWS:
            self._look_at_waiting()
            self._source = source
        self._waiting.append((number, row))

    def chosen(self) -> np.ndarray:
        """bool per row, in the order of ``add``: whether to keep it.

        Rows that do not fit count as kept if their hash is small enough, so that they are reported
        as too long and not as beyond ``max_rows``. Equal rows are all kept or all dropped.
        """
        return below_threshold(self.hashes, threshold_of(self.smallest(), self._max_rows))

    @property
    def hashes(self) -> np.ndarray:
        """uint64[n]: hashes of the rows, in the order of ``add``."""
        return np.frombuffer(self._hashes, np.uint64)

    def smallest(self) -> list[int]:
        """The ``max_rows + 1`` smallest hashes of the rows that fit, or all of them, unordered."""
        self._look_at_waiting()
        return [-number for number in self._smallest]

    def _threshold(self) -> int:
        """``threshold_of`` the rows tokenised so far."""
        return -self._smallest[0] if len(self._smallest) > self._max_rows else 1 << 64

    def _look_at_waiting(self) -> None:
        rows = [row for _, row in self._waiting]
        encoded = self._renderer.encode_batch(rows, self._source) if rows else []
        for (number, _), row in zip(self._waiting, encoded, strict=True):
            tokens, prompt_length, drop, *_ = row
            if drop or length_problem(len(tokens), prompt_length, self._max_length):
                continue
            heapq.heappush(self._smallest, -number)
            if len(self._smallest) > self._max_rows + 1:
                heapq.heappop(self._smallest)
        self._waiting = []
