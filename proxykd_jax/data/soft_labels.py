"""Soft labels on disk, computed once, from which the student learns.

``<folder>/<split>/part_00000.safetensors`` holds for each position of each answer the ids of the
proxy's most probable tokens, their log-probs under the full softmax, the log-prob of the actual
token and the log of the probability outside the ids; and for each row the sha256 of its tokens and
the log-likelihood of its answer. The manifest records proxy, tokenizer, template and temperature.
Files are memory-mapped, and rows can be read in any order.

Precision of ``store_dtype: float16``: a log-prob is rounded by at most 2^-11 of itself. The KL
weights this by the probability: p |log p| 2^-11, at most 1.8e-4 nats. Most of it changes the
position's total probability; reading removes that by scaling the probabilities and the tail to sum
to 1. What remains is 2^-11 of the KL's own log-ratios, with random sign. The tail is also weighted
by its probability, so it has the same dtype. At top_k 10 a token costs 44 bytes with 16-bit ids and
64 with 32-bit ids, and a row costs 49.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from proxykd_jax.artifacts import finished_manifest, read_manifest
from proxykd_jax.data.parts import Part, PartFolder, damaged
from proxykd_jax.data.sample_weights import Weights, weights_of
from proxykd_jax.errors import UserError

__all__ = [
    "SoftLabelStore",
    "SoftLabelWriter",
    "SoftLabels",
    "Weights",
    "ids_dtype",
    "open_soft_labels",
    "weights_of",
]

_ROW_ID_BYTES = 32
_LARGEST_16_BIT_VOCABULARY = 65_536
# Largest deviation of a sum of probabilities from 1 that float32 summation alone causes.
_SUM_SLACK = 1e-4


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels of one answer of R tokens.

    Attributes:
      row_id: id of the row (prompt and answer).
      ids: int32 ``[R, K]``, in descending order of probability.
      logps: float32 ``[R, K]``, nats, under the full softmax at the store's temperature.
      gold_logps: float32 ``[R]``, of the actual token, at temperature 1.
      tail_logps: float32 ``[R]``, log of the probability outside the ids; -inf if zero.
      finished: the answer has an end token.
    """

    row_id: str
    ids: np.ndarray
    logps: np.ndarray
    gold_logps: np.ndarray
    tail_logps: np.ndarray
    finished: bool = True

    @property
    def seq_loglik(self) -> float:
        """log pi_p(y|x); the sum is float64."""
        return float(np.sum(self.gold_logps, dtype=np.float64))


class SoftLabelWriter:
    """Writes the parts of one split.

    Args:
      folder: the store's folder.
      split: name of the split.
      vocab_size: ids are below it.
      top_k: K.
      store_dtype: dtype of all stored log-probs, ``float16`` or ``float32``.
    """

    def __init__(
        self, folder: Path, split: str, *, vocab_size: int, top_k: int, store_dtype: str
    ) -> None:
        self.parts = PartFolder(Path(folder) / split)
        self._ids_dtype = ids_dtype(vocab_size)
        self._logps_dtype = np.dtype(store_dtype)
        self.top_k = top_k

    def missing(self, num_parts: int) -> list[int]:
        """Parts still to make, after removing what a kill left half-written."""
        return self.parts.resume(num_parts)

    def commit(self, index: int, rows: Sequence[SoftLabels]) -> None:
        """Writes a whole part or nothing.

        Raises:
          UserError: log-probs are NaN.
        """
        offsets = np.zeros(len(rows) + 1, np.int64)
        offsets[1:] = np.cumsum([len(row.gold_logps) for row in rows])
        row_ids = np.frombuffer(b"".join(bytes.fromhex(row.row_id) for row in rows), np.uint8)
        no_tokens = SoftLabels(
            "",
            np.zeros((0, self.top_k), np.int32),
            np.zeros((0, self.top_k), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
        )
        joined = {
            name: np.concatenate([getattr(row, name) for row in (no_tokens, *rows)])
            for name in ("ids", "logps", "gold_logps", "tail_logps")
        }
        if any(np.isnan(joined[name]).any() for name in ("logps", "gold_logps", "tail_logps")):
            raise UserError(
                "The proxy gives log-probs that are not numbers (NaN) while scoring: its weights "
                "or its adapter are damaged."
            )
        logps = {
            name: _narrowed(joined[name], self._logps_dtype)
            for name in ("logps", "gold_logps", "tail_logps")
        }
        self.parts.commit(
            index,
            {
                "ids": joined["ids"].astype(self._ids_dtype),
                **logps,
                "offsets": offsets,
                "row_ids": row_ids.reshape(len(rows), _ROW_ID_BYTES),
                "seq_logliks": np.array([row.seq_loglik for row in rows], np.float64),
                "finished": np.array([row.finished for row in rows], np.bool_),
            },
        )


def ids_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer dtype that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= _LARGEST_16_BIT_VOCABULARY else np.uint32)


def open_soft_labels(folder: Path | str) -> SoftLabelStore:
    """Opens a complete store.

    Raises:
      UserError: it is missing, incomplete or damaged.
    """
    folder = Path(folder)
    return SoftLabelStore(folder, finished_manifest(folder, "score", "soft labels"))


class SoftLabelStore:
    """Soft labels by split and row number.

    Attributes:
      folder: its location.
      settings: settings it was made with: ``top_k``, ``temperature``, ``store_dtype``,
        ``vocab_size``.
      inputs: identities of its inputs: ``proxy``, ``corpus``, ``tokenizer``, ``template``.
      figures: the manifest's figures, by split.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings: dict[str, Any] = dict(manifest["settings"])
        self.inputs: dict[str, Any] = dict(manifest["inputs"])
        self.figures: dict[str, dict[str, Any]] = dict(manifest.get("figures", {}))
        self.top_k: int = self.settings["top_k"]
        self.temperature: float = self.settings["temperature"]
        self.vocab_size: int = self.settings["vocab_size"]
        self._slack = _SUM_SLACK
        if self.settings["store_dtype"] == "float16":
            # Rounding changes the sum by at most 2^-11 of the entropy of the K ids and the tail.
            self._slack += 2**-11 * math.log(self.top_k + 1)
        self._splits: dict[str, tuple[list[Part], np.ndarray]] = {}

    @classmethod
    def unfinished(cls, folder: Path) -> SoftLabelStore:
        """The store of a stage that is still running, to compute its figures."""
        return cls(folder, read_manifest(Path(folder)))

    def check(self, **expected: Any) -> None:
        """Refuses a store that was made with other settings or inputs.

        Args:
          **expected: required values of ``settings`` or ``inputs``.

        Raises:
          UserError: some differ; the message names all of them.
        """
        made = {**self.inputs, **self.settings}
        wrong = [
            f"{name}: {made.get(name)!r} in the store, {value!r} in this run"
            for name, value in expected.items()
            if made.get(name) != value
        ]
        if wrong:
            listed = "\n  ".join(wrong)
            raise UserError(
                f"The soft labels in {self.folder} do not belong to this run:\n  {listed}\n"
                f"Remove {self.folder} and run score again, or give the run another name."
            )

    def num_rows(self, split: str) -> int:
        """Number of rows of a split."""
        return int(self._open(split)[1][-1])

    def seq_logliks(self, split: str) -> np.ndarray:
        """float64 ``[n]``: log pi_p(y|x) of a split's rows, in nats; reads no tokens."""
        return self._column(split, "seq_logliks", np.float64)

    def finished(self, split: str) -> np.ndarray:
        """bool ``[n]``: which answers have an end token."""
        return self._column(split, "finished", np.bool_)

    def lengths(self, split: str) -> np.ndarray:
        """int32 ``[n]``: response tokens of a split's rows."""
        parts = self._open(split)[0]
        lengths = [np.diff(part.arrays["offsets"]).astype(np.int32) for part in parts]
        return np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    def read(
        self,
        split: str,
        indices: Sequence[int] | np.ndarray,
        row_ids: Sequence[str] | None = None,
    ) -> list[SoftLabels]:
        """Soft labels of rows, in the given order; safe to call from several threads.

        Args:
          split: name of the split.
          indices: row numbers.
          row_ids: if given, checks that the labels belong to the rows with these ids.

        Raises:
          IndexError: there is no such row.
          UserError: a row's labels belong to other tokens, or are not probabilities.
        """
        parts, ends = self._open(split)
        out = []
        for place, index in enumerate(np.asarray(indices, np.int64)):
            if not 0 <= index < ends[-1]:
                raise IndexError(f"Split {split!r} has {ends[-1]} rows, asked for {index}.")
            number = int(np.searchsorted(ends, index, side="right")) - 1
            labels = self._row(parts[number], int(index - ends[number]))
            if row_ids is not None and labels.row_id != row_ids[place]:
                raise UserError(
                    f"Row {index} of split {split!r} is not the row that the soft labels in "
                    f"{self.folder} were made for: the corpus has changed. Remove {self.folder} "
                    "and run score again."
                )
            out.append(labels)
        return out

    def top_k_mass(self, split: str, part: int) -> np.ndarray:
        """float32: probability of the stored ids at every position of one part."""
        logps = self._open(split)[0][part].arrays["logps"].astype(np.float32)
        return np.exp(logps).sum(axis=-1)

    def num_parts(self, split: str) -> int:
        """Number of parts of a split."""
        return len(self._open(split)[0])

    def _row(self, part: Part, place: int) -> SoftLabels:
        arrays = part.arrays
        begin, end = arrays["offsets"][place : place + 2]
        logps = arrays["logps"][begin:end].astype(np.float32)
        tail_logps = arrays["tail_logps"][begin:end].astype(np.float32)
        labels = SoftLabels(
            row_id=arrays["row_ids"][place].tobytes().hex(),
            ids=arrays["ids"][begin:end].astype(np.int32),
            logps=logps,
            gold_logps=arrays["gold_logps"][begin:end].astype(np.float32),
            tail_logps=tail_logps,
            finished=bool(arrays["finished"][place]),
        )
        problem = self._problem(labels)
        if problem:
            raise damaged(part.path, f"row {place}: {problem}")
        if self.settings["store_dtype"] == "float32":
            return labels
        total = np.log(np.exp(logps).sum(axis=-1) + np.exp(tail_logps))
        return SoftLabels(
            labels.row_id,
            labels.ids,
            np.minimum(logps - total[:, None], 0.0),
            labels.gold_logps,
            np.minimum(tail_logps - total, 0.0),
            labels.finished,
        )

    def _problem(self, labels: SoftLabels) -> str | None:
        """Why these labels are not the top k of a distribution; None if they are."""
        if labels.ids.size == 0:
            return None
        if labels.ids.min() < 0 or labels.ids.max() >= self.vocab_size:
            return f"an id is not below the vocabulary's size, {self.vocab_size}"
        if self.top_k > 1:
            ordered = np.sort(labels.ids, axis=-1)
            if (ordered[:, 1:] == ordered[:, :-1]).any():
                return "an id occurs twice at a position"
            if (labels.logps[:, 1:] > labels.logps[:, :-1]).any():
                return "log-probs are not in falling order"
        probs = np.exp(labels.logps).sum(axis=-1) + np.exp(labels.tail_logps)
        # Written so that NaN fails as well.
        if not (probs <= 1 + self._slack).all():
            return "probabilities add up to more than 1"
        if not (probs >= 1 - self._slack).all():
            return "probabilities, the tail's included, add up to less than 1"
        if not (labels.gold_logps <= 0).all():
            return "the log-prob of an actual token is above 0"
        return None

    def _column(self, split: str, name: str, dtype: Any) -> np.ndarray:
        parts = self._open(split)[0]
        return (
            np.concatenate([part.arrays[name] for part in parts]) if parts else np.zeros(0, dtype)
        )

    def _open(self, split: str) -> tuple[list[Part], np.ndarray]:
        """The parts of a split and their first row numbers, followed by the number of rows."""
        if split not in self._splits:
            folder = PartFolder(self.folder / split)
            numbers = folder.complete()
            if numbers != list(range(len(numbers))):
                raise UserError(
                    f"{folder.folder} lacks a part (there are {numbers}). Remove {self.folder} and "
                    "run score again."
                )
            parts = [folder.open(number) for number in numbers]
            for part in parts:
                self._check_part(part)
            ends = np.cumsum([0, *(len(part.arrays["seq_logliks"]) for part in parts)])
            self._splits[split] = parts, ends
        return self._splits[split]

    def _check_part(self, part: Part) -> None:
        """Raises UserError if a part's arrays do not fit together or do not fit the manifest."""
        arrays = part.arrays
        try:
            rows, tokens = len(arrays["seq_logliks"]), len(arrays["gold_logps"])
            dtype = np.dtype(self.settings["store_dtype"])
            offsets = arrays["offsets"]
            fits = (
                arrays["ids"].shape == arrays["logps"].shape == (tokens, self.top_k)
                and arrays["ids"].dtype == ids_dtype(self.vocab_size)
                and arrays["tail_logps"].shape == (tokens,)
                and all(arrays[n].dtype == dtype for n in ("logps", "gold_logps", "tail_logps"))
                and offsets.shape == (rows + 1,)
                and offsets[0] == 0
                and offsets[-1] == tokens
                and bool((np.diff(offsets) >= 0).all())
                and arrays["row_ids"].shape == (rows, _ROW_ID_BYTES)
                and arrays["finished"].shape == (rows,)
            )
        except KeyError as error:
            raise damaged(part.path, f"it has no array {error}") from error
        if not fits:
            raise damaged(part.path, "its arrays do not fit together or to the manifest")


def _narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Log-probs in the store's dtype; finite ones stay finite, and none becomes positive."""
    values = np.minimum(values, 0.0)
    lowest = float(np.finfo(dtype).min)
    return np.where(np.isneginf(values), values, np.maximum(values, lowest)).astype(dtype)
