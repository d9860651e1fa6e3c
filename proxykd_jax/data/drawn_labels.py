"""Soft labels drawn at random (RS-KD), on disk: distinct ids and how often each was drawn.

``<folder>/<split>/part_00000.safetensors`` holds for each position of each answer its distinct ids,
their counts and, for draws from a proposal other than p, the weights p / proposal; and for each row
the sha256 of its tokens. With 50 draws, 8-bit counts and 16-bit ids, a slot costs 3 bytes, and a
position has about a dozen slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from proxykd_jax.data.parts import Part, PartFolder, damaged
from proxykd_jax.data.soft_labels import ids_dtype
from proxykd_jax.errors import UserError

_ROW_ID_BYTES = 32


@dataclass(frozen=True)
class DrawnRow:
    """The draws of one answer of R tokens, with K slots per position; count 0 marks an empty slot.

    Attributes:
      row_id: id of the row (prompt and answer).
      ids: int32 ``[R, K]``.
      counts: int32 ``[R, K]``; they add up to the number of draws at each position.
      weights: float32 ``[R, K]``, p / proposal; 1 if ids are drawn from p.
    """

    row_id: str
    ids: np.ndarray
    counts: np.ndarray
    weights: np.ndarray

    def log_targets(self, num_draws: int) -> np.ndarray:
        """float32 ``[R, K]``: log of counts / N x weights; -inf for an empty slot."""
        with np.errstate(divide="ignore"):
            return np.log(self.counts / np.float32(num_draws) * self.weights, dtype=np.float32)


class DrawnLabels:
    """The draws of one split, written part by part; rows can be read in any order.

    Args:
      folder: the store's folder.
      split: name of the split.
      vocab_size: ids are below it.
      num_draws: N at each position.
      weighted: whether weights are stored.
    """

    def __init__(
        self, folder: Path, split: str, *, vocab_size: int, num_draws: int, weighted: bool
    ) -> None:
        self._parts = PartFolder(Path(folder) / split)
        self._vocab_size, self._num_draws, self._weighted = vocab_size, num_draws, weighted
        self._open: tuple[list[Part], np.ndarray] | None = None

    @property
    def slots(self) -> int:
        """K: largest number of distinct ids per position."""
        return min(self._num_draws, self._vocab_size)

    def missing(self, num_parts: int) -> list[int]:
        """Parts still to make, after removing what a kill left half-written."""
        return self._parts.resume(num_parts)

    def commit(self, index: int, rows: Sequence[DrawnRow]) -> None:
        """Writes a whole part or nothing.

        Raises:
          UserError: weights are NaN.
        """
        counts = np.concatenate([np.zeros((0, self.slots), np.int32), *(r.counts for r in rows)])
        ids = np.concatenate([np.zeros((0, self.slots), np.int32), *(r.ids for r in rows)])
        weights = np.concatenate(
            [np.zeros((0, self.slots), np.float32), *(r.weights for r in rows)]
        )
        drawn = counts > 0
        if not np.isfinite(weights[drawn]).all():
            raise UserError(
                "The proxy gives log-probs that are not numbers (NaN) while labels are drawn: its "
                "weights or its adapter are damaged."
            )
        offsets = np.zeros(len(rows) + 1, np.int64)
        offsets[1:] = np.cumsum([len(row.ids) for row in rows])
        row_ids = np.frombuffer(b"".join(bytes.fromhex(row.row_id) for row in rows), np.uint8)
        self._parts.commit(
            index,
            {
                "offsets": offsets,
                "slots": np.concatenate([[0], np.cumsum(drawn.sum(axis=-1))]).astype(np.int64),
                "ids": ids[drawn].astype(ids_dtype(self._vocab_size)),
                "counts": counts[drawn].astype(np.min_scalar_type(self._num_draws)),
                **({"weights": weights[drawn]} if self._weighted else {}),
                "row_ids": row_ids.reshape(len(rows), _ROW_ID_BYTES),
            },
        )

    def read(self, indices: Sequence[int], row_ids: Sequence[str]) -> list[DrawnRow]:
        """Reads draws of rows, in the given order; safe to call from several threads.

        Args:
          indices: row numbers.
          row_ids: ids of the rows that the draws must belong to.

        Raises:
          UserError: they belong to other rows, or a file is damaged.
        """
        parts, ends = self._loaded()
        found = []
        for index, row_id in zip(np.asarray(indices, np.int64), row_ids, strict=True):
            if not 0 <= index < ends[-1]:
                raise IndexError(f"{self._parts.folder} has {ends[-1]} rows, asked for {index}.")
            number = int(np.searchsorted(ends, index, side="right")) - 1
            row = self._row(parts[number], int(index - ends[number]))
            if row.row_id != row_id:
                raise UserError(
                    f"Row {index} is not the row that the labels in {self._parts.folder} were "
                    "drawn for: the corpus has changed. Remove the folder and run score again."
                )
            found.append(row)
        return found

    def _row(self, part: Part, place: int) -> DrawnRow:
        arrays = part.arrays
        begin, end = arrays["offsets"][place : place + 2]
        bounds = arrays["slots"][begin : end + 1]
        sizes, some = np.diff(bounds), slice(bounds[0], bounds[-1])
        filled = np.arange(self.slots) < sizes[:, None]
        ids, counts = np.zeros((2, *filled.shape), np.int32)
        weights = np.ones(filled.shape, np.float32)
        ids[filled], counts[filled] = arrays["ids"][some], arrays["counts"][some]
        if self._weighted:
            weights[filled] = arrays["weights"][some]
        if (counts.sum(axis=-1) != self._num_draws).any() or ids.max(initial=0) >= self._vocab_size:
            raise damaged(part.path, "counts that do not add up, or ids beyond the vocabulary")
        return DrawnRow(arrays["row_ids"][place].tobytes().hex(), ids, counts, weights)

    def _loaded(self) -> tuple[list[Part], np.ndarray]:
        if self._open is None:
            parts = [self._parts.open(number) for number in self._parts.complete()]
            for part in parts:
                self._check(part)
            self._open = parts, np.cumsum([0, *(len(p.arrays["row_ids"]) for p in parts)])
        return self._open

    def _check(self, part: Part) -> None:
        arrays = part.arrays
        try:
            slots = len(arrays["ids"])
            fits = (
                arrays["counts"].shape == (slots,)
                and (not self._weighted or arrays["weights"].shape == (slots,))
                and len(arrays["offsets"]) == len(arrays["row_ids"]) + 1
                and len(arrays["slots"]) == arrays["offsets"][-1] + 1
                and arrays["slots"][-1] == slots
            )
        except KeyError as error:
            raise damaged(part.path, f"it has no array {error}") from error
        if not fits:
            raise damaged(part.path, "its arrays do not fit together")
