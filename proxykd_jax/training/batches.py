"""The batches of a phase: which rows, in which order, how they are collated, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from proxykd_jax.artifacts import MANIFEST
from proxykd_jax.data.collate import Rows, TokenRow, collate_rows, learnt_places
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.order import (
    Batching,
    EpochPlan,
    PlannedBatch,
    affordable_parts,
    default_buckets,
    plan_epoch,
)
from proxykd_jax.data.soft_labels import SoftLabels
from proxykd_jax.data.stream import BatchStream
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.processes import own_part, put_own_rows
from proxykd_jax.parallel.sharding import put_rows, row_ways
from proxykd_jax.types import DistillBatch, TokenBatch

Plan = Callable[[int], EpochPlan]
# (row numbers, row ids) -> soft labels of these rows of a split.
ReadLabels = Callable[[list[int], list[str]], Sequence[SoftLabels]]


@dataclass(frozen=True)
class Selection:
    """Some rows of a split, in the given order."""

    split: Rows
    rows: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int32 tokens of each row."""
        return self.split.lengths[self.rows]

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 tokens of each prompt."""
        return self.split.prompt_lengths[self.rows]

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32 tokens of each prompt that are in the loss."""
        return self.split.earlier_lengths[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Reads rows by their place in the selection."""
        return self.split.read([int(row) for row in self.rows[np.asarray(indices, np.int64)]])


@dataclass(frozen=True)
class LastAnswers:
    """Rows with their last answer alone in the loss, for comparing it with a sampled one."""

    rows: Rows

    @property
    def lengths(self) -> np.ndarray:
        """int32 tokens of each row."""
        return self.rows.lengths

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 tokens of each prompt."""
        return self.rows.prompt_lengths

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32 zeros."""
        return np.zeros_like(self.rows.prompt_lengths)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Reads rows by number."""
        return [row.with_last_answer for row in self.rows.read(indices)]


class Joined:
    """Rows of several splits, one after another.

    Args:
      splits: name -> rows.
    """

    def __init__(self, splits: Mapping[str, Rows]) -> None:
        self._splits = dict(splits)
        self._names = list(splits)
        self._starts = np.cumsum([0, *(len(rows) for rows in splits.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray:
        """int32 tokens of each row."""
        return self._of_all([rows.lengths for rows in self._splits.values()])

    @property
    def prompt_lengths(self) -> np.ndarray:
        """int32 tokens of each prompt."""
        return self._of_all([rows.prompt_lengths for rows in self._splits.values()])

    @property
    def earlier_lengths(self) -> np.ndarray:
        """int32 tokens of each prompt that are in the loss."""
        return self._of_all([rows.earlier_lengths for rows in self._splits.values()])

    @staticmethod
    def _of_all(lengths: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int32), *lengths])

    def split(self, name: str) -> Rows:
        """Returns the rows of one split."""
        return self._splits[name]

    def place(self, index: int) -> tuple[str, int]:
        """Returns (split, index within the split) of a row."""
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._names[part], index - int(self._starts[part])

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Reads rows, split by split, and returns them in the order of ``indices``."""
        return gather(
            [self.place(index) for index in indices],
            lambda name, wanted: self._splits[name].read(wanted),
        )


def gather(
    places: Sequence[tuple[str, int]], read: Callable[[str, list[int]], Sequence[Any]]
) -> list[Any]:
    """Reads from several splits, each at once; returns the results in the order of ``places``."""
    found: list[Any] = [None] * len(places)
    for name in dict.fromkeys(name for name, _ in places):
        wanted = [i for i, (owner, _) in enumerate(places) if owner == name]
        for i, value in zip(wanted, read(name, [places[i][1] for i in wanted]), strict=True):
            found[i] = value
    return found


def check_any_rows(corpus: TokenCorpus, splits: Collection[str]) -> None:
    """Checks that there is something to learn from.

    Raises:
      UserError: none of the splits has a row.
    """
    if not any(len(corpus.split(name)) for name in splits):
        raise UserError(
            f"{corpus.folder} has no rows in {', '.join(splits)}, so there is nothing to learn "
            f"from. The counts in its {MANIFEST} say how many rows were read, and why they were "
            "dropped (corpus.max_length is in tokens)."
        )


def make_plan(
    positions: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    batching: Batching,
    max_length: int,
    answers: np.ndarray | None = None,
    together: int = 1,
    epochs: int = 1,
    most: int | None = None,
) -> Plan:
    """Returns a function from the epoch to its batches.

    Args:
      positions: integer[n], positions that each example takes (its tokens less one).
      seed: from ``purpose_seed``.
      batch_size, batching: as in the config.
      max_length: tokens of the longest row that the corpus may hold.
      answers: integer[n], positions of each example at which logits are computed (default: all).
      together: see ``rows_together``.
      epochs, most: as in ``count_steps``; with many steps, batches have more shapes.
    """
    steps = -(-len(positions) // batch_size) * epochs
    if most is not None:
        steps = min(steps, most)
    buckets = default_buckets(max_length, steps)

    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(
            positions,
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            batching=batching,
            buckets=buckets,
        )

    if answers is None:
        return plan
    parts = affordable_parts(plan(0), answers, together=together, steps=steps)
    if parts is None:
        return plan
    return lambda epoch: plan(epoch).with_answers(answers, together=together, parts=parts)


def rows_together(batch_size: int, microbatches: int, mesh: Mesh) -> int:
    """Returns how many rows share one list of their answers' positions: the rows of one device.

    Returns 1, a list for each row, if micro-batches regroup the rows or if the mesh does not
    divide the batch.
    """
    ways = row_ways(mesh.shape)
    return batch_size // ways if microbatches == 1 and batch_size % ways == 0 else 1


def count_steps(plan: Plan, epochs: int, most: int | None) -> int:
    """Returns the steps of ``epochs`` epochs, at most ``most``."""
    steps = 0
    for epoch in range(epochs):
        steps += len(plan(epoch))
        if most is not None and steps >= most:
            return most
    return steps


def placed_batches(
    plan: Plan, collate: Callable[[PlannedBatch], Any], *, start: int, stop: int, mesh: Mesh
) -> Iterator[Any]:
    """Yields the collated batches of the steps ``start`` to ``stop - 1``, on the devices."""
    part = own_part(mesh)
    stream = BatchStream(
        plan,
        collate,
        start_step=start,
        num_steps=stop,
        process_index=part[0],
        process_count=part[1],
    )
    for batch in stream:
        yield put_own_rows(batch, mesh, part) if part[1] > 1 else put_rows(batch, mesh)


def planned_steps(plan: Plan) -> Callable[[int], PlannedBatch]:
    """Returns a function from a step to its planned batch, which is whole on every process.

    It serves batches that are made from the state that they train.
    """
    return BatchStream(plan, lambda planned: planned).planned


def token_collate(rows: Rows) -> Callable[[PlannedBatch], TokenBatch]:
    """Returns a function from a planned batch to its tokens, for the NLL alone."""

    def collate(planned: PlannedBatch) -> TokenBatch:
        return _collate(_read_rows(rows, planned), planned)

    return collate


def answer_positions(rows: Rows) -> np.ndarray:
    """Returns the number of positions inside the mask of each example: its answers' tokens."""
    return rows.lengths - np.maximum(rows.prompt_lengths, 1) + rows.earlier_lengths


def distill_collate(
    rows: Joined,
    labels: Mapping[str, ReadLabels],
    weights: Mapping[str, np.ndarray],
    teacher_splits: Collection[str],
    *,
    top_k: int,
) -> Callable[[PlannedBatch], DistillBatch]:
    """Returns a function from a planned batch to the arrays of eq. 11.

    Args:
      rows: rows of all splits that the student sees.
      labels: functions that read the soft labels, by split.
      weights: float32[n] sample weights, by split.
      teacher_splits: splits with the teacher's answers; the others have no NLL.
      top_k: ids at each position of all labels.
    """
    # Positions without labels get a uniform distribution, so that masked values stay finite.
    nothing = -np.log(np.float32(top_k + 1))

    def read(name: str, wanted: list[int]) -> list[tuple[TokenRow, SoftLabels, float]]:
        found = rows.split(name).read(wanted)
        stored = labels[name](wanted, [row.row_id for row in found])
        return list(zip(found, stored, weights[name][wanted], strict=True))

    def collate(planned: PlannedBatch) -> DistillBatch:
        size, length, segments = len(planned.rows), planned.length, planned.num_segments
        ids_BLK = np.broadcast_to(np.arange(top_k, dtype=np.int32), (size, length, top_k)).copy()
        logps_BLK = np.full((size, length, top_k), nothing, np.float32)
        tail_BL = np.full((size, length), nothing, np.float32)
        weight_BS = np.zeros((size, segments), np.float32)
        nll_mask_BS = np.zeros((size, segments), bool)
        examples: list[list[TokenRow]] = []
        places = [[rows.place(index) for index in row] for row in planned.rows]
        found = iter(gather([place for row in places for place in row], read))
        for b, row in enumerate(places):
            examples.append([])
            begin = 0
            for s, (name, _) in enumerate(row):
                example, stored, weight = next(found)
                examples[-1].append(example)
                end = begin + len(example.tokens) - 1
                answer: Any = slice(end - len(stored.ids), end)
                if example.earlier is not None:
                    answer = begin - 1 + learnt_places(example)
                ids_BLK[b, answer] = stored.ids
                logps_BLK[b, answer] = stored.logps
                tail_BL[b, answer] = stored.tail_logps
                weight_BS[b, s] = weight
                nll_mask_BS[b, s] = name in teacher_splits
                begin = end
        return DistillBatch(
            rows=_collate(examples, planned),
            topk_ids_BLK=ids_BLK,
            topk_logps_BLK=logps_BLK,
            tail_logps_BL=tail_BL,
            sample_weight_BS=weight_BS,
            nll_mask_BS=nll_mask_BS,
        )

    return collate


def _read_rows(rows: Rows, planned: PlannedBatch) -> list[list[TokenRow]]:
    found = iter(rows.read([place for row in planned.rows for place in row]))
    return [[next(found) for _ in row] for row in planned.rows]


def _collate(rows: list[list[TokenRow]], planned: PlannedBatch) -> TokenBatch:
    size = len(planned.rows)
    counted = (planned.answers, planned.together)
    return collate_rows(rows, planned.length, planned.num_segments, size, *counted)
