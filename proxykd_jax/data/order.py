"""The order of an epoch: a pure function of (seed, epoch, lengths), without state.

So a checkpoint stores a step and no iterator, and every process computes the same global batches.
Plans are NumPy arrays; Python objects are made only for the batch that is accessed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from proxykd_jax.random_keys import raw_bits

Batching = Literal["pad", "bucket", "pack"]

# Rows are sorted by length, or packed, within windows of the shuffled order, so batches stay
# random. With 64 batches per window, neighbours in length are so close that almost all padding
# comes from rounding up to buckets.
_WINDOW_BATCHES = 64
_PACK_WINDOW_ROWS = 1024
_MOST_SEGMENTS = 64
# A is a multiple of this fraction of its rows' positions. Each A compiles another program. For 26
# batches of GPT-4's answers on one device, eighths give 24 programs and 1.10 positions per answer
# token, sixteenths 26 and 1.04, parts of 32 26 and 1.03. For 81 batches of stories the three give
# 23, 32 and 41 programs.
_ANSWER_PARTS = (32, 16, 8, 4, 2)
# Compiling a program takes as long as 10 to 30 steps, and closer lengths save a tenth of a step.
# Fewer than 8 lengths are no closer than the default ones. 32 leave 3 to 6 % padding; more would
# fill a process with programs (``parallel/mappings.py``).
_CLOSE_LENGTHS = (16, 32, 64, 128, 256)
_STEPS_A_PROGRAM = 16
_FEWEST_LENGTHS, _MOST_LENGTHS = 8, 32
_MOST_PROGRAMS = 48  # in the first epoch; later epochs add some
_ROWS, _BATCHES = 0, 1  # purposes of a permutation: independent random streams


@dataclass(frozen=True)
class PlannedBatch:
    """The contents of one global batch.

    Attributes:
      rows: indices of the examples of each row; an empty tuple is a padding row. There are always
        ``batch_size`` rows.
      length: positions per row.
      num_segments: S, most examples per row; the same in all batches of a plan.
      answers: A, size of the list of positions inside the mask for ``together`` rows; None if they
        were not counted.
      together: number of consecutive rows that share a list.
    """

    rows: tuple[tuple[int, ...], ...]
    length: int
    num_segments: int = 1
    answers: int | None = None
    together: int = 1


class EpochPlan(Sequence[PlannedBatch]):
    """All batches of an epoch, in order.

    Attributes:
      batch_size: rows per batch.
      num_segments: S of each batch.
    """

    def __init__(
        self,
        examples: np.ndarray,
        row_starts: np.ndarray,
        batch_starts: np.ndarray,
        batch_lengths: np.ndarray,
        *,
        batch_size: int,
        num_segments: int,
    ) -> None:
        self.batch_size = batch_size
        self.num_segments = num_segments
        self._examples = examples
        self._row_starts = row_starts  # one more than there are rows
        self._batch_starts = batch_starts
        self._batch_lengths = batch_lengths
        self._together = 1
        self._batch_answers: np.ndarray | None = None

    @property
    def num_shapes(self) -> int:
        """Number of different batch shapes; each compiles a program."""
        answers = self._batch_lengths if self._batch_answers is None else self._batch_answers
        return len(set(zip(self._batch_lengths.tolist(), answers.tolist(), strict=True)))

    def with_answers(self, answers: np.ndarray, *, together: int, parts: int) -> EpochPlan:
        """The same batches, with the size of the list that their answers need.

        Args:
          answers: integer[n], positions inside the mask of each example.
          together: number of rows of a batch that share a list; it divides ``batch_size``.
          parts: A is a multiple of the positions of ``together`` rows divided by this number.

        Raises:
          ValueError: the rows cannot be grouped.
        """
        if self.batch_size % together:
            raise ValueError(f"{self.batch_size} rows cannot be split into groups of {together}.")
        before = np.concatenate([[0], np.cumsum(np.asarray(answers, np.int64)[self._examples])])
        of_row = np.diff(before[self._row_starts])
        of_row = np.pad(of_row, (0, self.batch_size))  # the last batch may have fewer rows
        rows = self._batch_starts[:, None] + np.arange(self.batch_size)
        groups = (len(self), self.batch_size // together, together)
        most = of_row[rows].reshape(groups).sum(2).max(1)
        whole = together * self._batch_lengths
        part = -(-whole // parts)
        found = copy.copy(self)
        found._together = together
        found._batch_answers = np.minimum(-(-most // part) * part, whole)
        return found

    def examples(self, batches: int) -> np.ndarray:
        """Indices of the examples of the first so many batches, in no particular order."""
        starts = self._batch_starts[:batches]
        ends = np.minimum(starts + self.batch_size, len(self._row_starts) - 1)
        begin, stop = self._row_starts[starts], self._row_starts[ends]
        parts = [self._examples[a:b] for a, b in zip(begin, stop, strict=True)]
        return np.concatenate([self._examples[:0], *parts])

    def __len__(self) -> int:
        return len(self._batch_starts)

    @overload
    def __getitem__(self, index: int) -> PlannedBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[PlannedBatch]: ...
    def __getitem__(self, index: int | slice) -> PlannedBatch | list[PlannedBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"batch {index} of a plan of {len(self)}")
        first = int(self._batch_starts[index])
        last = min(first + self.batch_size, len(self._row_starts) - 1)
        rows = [
            tuple(self._examples[self._row_starts[r] : self._row_starts[r + 1]].tolist())
            for r in range(first, last)
        ]
        rows += [()] * (self.batch_size - len(rows))
        answers = None if self._batch_answers is None else int(self._batch_answers[index])
        return PlannedBatch(
            tuple(rows),
            int(self._batch_lengths[index]),
            self.num_segments,
            answers,
            self._together,
        )

    def __iter__(self) -> Iterator[PlannedBatch]:
        return (self[index] for index in range(len(self)))


def default_buckets(max_length: int, steps: int = 0) -> tuple[int, ...]:
    """Lengths that batches are padded to: 32, 48, 64, 96, ... up to what ``max_length`` needs.

    Steps of 1.5 and 1.33 keep padding under a third of a row, and the number of compiled shapes
    grows with the logarithm. If no row needs 32 positions, the only length is the next multiple of
    8.

    With many ``steps``, multiples of 256, 128, 64, 32 or 16 are used instead: at most 32 lengths,
    as close as possible while each is compiled for 16 steps or more.

    Args:
      max_length: tokens of the longest row; it has one position fewer.
      steps: number of steps to be taken on the batches.
    """
    longest = max(max_length - 1, 1)
    for step in _CLOSE_LENGTHS:
        lengths = range(step, longest + step, step)
        if _FEWEST_LENGTHS <= len(lengths) <= min(_MOST_LENGTHS, steps // _STEPS_A_PROGRAM):
            return tuple(lengths)
    buckets = []
    size = 32
    while size < longest:
        buckets.append(size)
        if size * 3 // 2 < longest:
            buckets.append(size * 3 // 2)
        size *= 2
    step = 32 if longest > 32 else 8
    return (*buckets, math.ceil(longest / step) * step)


def by_length(
    positions: np.ndarray, batch_size: int, buckets: Sequence[int]
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches for passes whose order does not matter: rows of similar length together.

    Args:
      positions: integer[n], positions of each example.
      batch_size: rows per batch; the last may have fewer.
      buckets: allowed batch lengths, ascending.

    Yields:
      (indices, length): the examples, and the smallest bucket that fits them.
    """
    order = np.argsort(positions, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, int(buckets[np.searchsorted(buckets, positions[indices[-1]])])


def permutation(count: int, *, seed: int, epoch: int, purpose: int = 0) -> np.ndarray:
    """int64[count]: a random order that depends only on the arguments.

    It sorts the raw bits of Philox, which are the same in every version of NumPy; the results of
    NumPy's ``permutation`` may change.
    """
    bits = raw_bits(count, seed=seed, index=epoch, purpose=purpose)
    return np.argsort(bits, kind="stable")


def plan_epoch(
    lengths: np.ndarray,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    batching: Batching,
    buckets: Sequence[int],
) -> EpochPlan:
    """Puts every example of a split into exactly one batch.

    ``pad``: batches of the shuffled order, each as long as the smallest bucket that fits its
    longest row. ``bucket``: the same after sorting by length within windows of the shuffled order;
    the batches are then shuffled. ``pack``: several examples share a row as long as the largest
    bucket, by first-fit decreasing within windows of the shuffled order; the rows are then
    shuffled. No example is left out: a batch that is not full gets empty rows.

    Args:
      lengths: integer[n], positions of each example (its tokens minus one).
      seed, epoch: determine the order.
      batch_size: rows per batch, over all processes.
      batching: one of the three above.
      buckets: allowed batch lengths, ascending.

    Raises:
      ValueError: an example is longer than the largest bucket.
    """
    lengths = np.asarray(lengths, np.int64)
    bucket_array = np.asarray(buckets, np.int64)
    longest = int(lengths.max(initial=0))
    if longest > bucket_array[-1]:
        raise ValueError(f"An example has {longest} positions, the largest bucket {buckets[-1]}.")
    order = permutation(len(lengths), seed=seed, epoch=epoch, purpose=_ROWS)
    if batching == "pack":
        capacity = int(bucket_array[-1])
        return _plan_packed(order, lengths, seed, epoch, batch_size, capacity)
    starts = np.arange(0, len(order), batch_size)
    if batching == "bucket":
        window = np.arange(len(order)) // (_WINDOW_BATCHES * batch_size)
        # Longest first, so that the batch that is not full holds the shortest rows.
        order = order[np.lexsort((-lengths[order], window))]
        starts = starts[permutation(len(starts), seed=seed, epoch=epoch, purpose=_BATCHES)]
    batch_lengths = [int(lengths[order[start : start + batch_size]].max()) for start in starts]
    return EpochPlan(
        order,
        np.arange(len(order) + 1),
        starts,
        bucket_array[np.searchsorted(bucket_array, np.asarray(batch_lengths, np.int64))],
        batch_size=batch_size,
        num_segments=1,
    )


def affordable_parts(
    plan: EpochPlan, answers: np.ndarray, *, together: int, steps: int
) -> int | None:
    """How finely A may follow the contents of batches when this many steps are taken on them.

    The largest ``parts`` for which each program is compiled for 16 steps or more, or for which
    there are no more programs than without counting answers.

    Args:
      plan: plan of the first epoch.
      answers, together: as in ``EpochPlan.with_answers``.
      steps: number of steps on batches of such plans.

    Returns:
      The parts; None if answers should not be counted.
    """
    most = max(min(steps // _STEPS_A_PROGRAM, _MOST_PROGRAMS), plan.num_shapes)
    for parts in _ANSWER_PARTS:
        if plan.with_answers(answers, together=together, parts=parts).num_shapes <= most:
            return parts
    return None


def packed_segments(lengths: np.ndarray, capacity: int) -> int:
    """S of packed rows: twice the number of examples of mean length that fit, at most 64.

    It depends only on the lengths, so all epochs have the same shapes.
    """
    if len(lengths) == 0:
        return 1
    mean = max(float(np.mean(lengths)), 1.0)
    return int(min(max(math.ceil(2 * capacity / mean), 1), _MOST_SEGMENTS))


def _plan_packed(
    order: np.ndarray,
    lengths: np.ndarray,
    seed: int,
    epoch: int,
    batch_size: int,
    capacity: int,
) -> EpochPlan:
    num_segments = packed_segments(lengths, capacity)
    row_of = np.empty(len(order), np.int64)  # the packed row of each index in the order
    num_rows = 0
    for start in range(0, len(order), _PACK_WINDOW_ROWS):
        window = slice(start, start + _PACK_WINDOW_ROWS)
        rows = _first_fit_decreasing(lengths[order[window]], capacity, num_segments)
        row_of[window] = rows + num_rows
        num_rows += int(rows.max()) + 1
    shuffled = permutation(num_rows, seed=seed, epoch=epoch, purpose=_BATCHES)
    place = np.empty(num_rows, np.int64)
    place[shuffled] = np.arange(num_rows)
    row_of = place[row_of]
    by_row = np.argsort(row_of, kind="stable")
    row_starts = np.zeros(num_rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=num_rows), out=row_starts[1:])
    starts = np.arange(0, num_rows, batch_size)
    return EpochPlan(
        order[by_row],
        row_starts,
        starts,
        np.full(len(starts), capacity, np.int64),
        batch_size=batch_size,
        num_segments=num_segments,
    )


def _first_fit_decreasing(lengths: np.ndarray, capacity: int, most: int) -> np.ndarray:
    """int64[n]: each example's row; a row holds ``capacity`` positions and ``most`` examples."""
    assignment = np.empty(len(lengths), np.int64)
    free = np.full(len(lengths), capacity, np.int64)
    count = np.zeros(len(lengths), np.int64)
    for example in np.argsort(-lengths, kind="stable"):
        # An unused row has room for every example, so argmax always finds one.
        row = int(np.argmax(free >= lengths[example]))
        assignment[example] = row
        free[row] -= lengths[example]
        count[row] += 1
        if count[row] == most:
            free[row] = -1
    return assignment
