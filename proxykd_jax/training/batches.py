"""Batches of a phase: which rows, in which order, put together how, placed where."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.data.collate import TokenRow, collate_rows
from proxykd_jax.data.order import Batching, EpochPlan, PlannedBatch, default_buckets, plan_epoch
from proxykd_jax.data.stream import BatchStream
from proxykd_jax.generation.samples import KEPT, SampleStore
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.types import PairBatch, TokenBatch

Plan = Callable[[int], EpochPlan]


class Rows(Protocol):
    """What is read of a split, or of rows chosen from splits."""

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def prompt_lengths(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> list[TokenRow]: ...


@dataclass(frozen=True)
class Selection:
    """Some rows of a split, in an order of their own."""

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

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, indices: Sequence[int]) -> list[TokenRow]:
        """Rows at places of the selection."""
        return self.split.read([int(row) for row in self.rows[np.asarray(indices, np.int64)]])


def phase_seed(seed: int, phase: str) -> int:
    """The seed of a phase's order: another for each phase of a run."""
    return zlib.crc32(f"{seed}/{phase}".encode())


def make_plan(
    positions: np.ndarray, *, seed: int, batch_size: int, batching: Batching, max_length: int
) -> Plan:
    """The batches of each epoch: a pure function of the epoch.

    Args:
      positions: places that each example takes (its tokens less one).
      seed: from ``phase_seed``.
      batch_size, batching: as in the config.
      max_length: tokens of the longest row that the corpus may hold.
    """
    buckets = default_buckets(max_length)

    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(
            positions,
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            batching=batching,
            buckets=buckets,
        )

    return plan


def count_steps(plan: Plan, epochs: int, most: int | None) -> int:
    """Steps of so many epochs, at most ``most``."""
    steps = sum(len(plan(epoch)) for epoch in range(epochs))
    return steps if most is None else min(steps, most)


def placed_batches(
    plan: Plan, collate: Callable[[PlannedBatch], Any], *, start: int, stop: int, mesh: Mesh
) -> Iterator[Any]:
    """Collated batches of the steps from ``start`` to ``stop``, on the devices."""
    stream = BatchStream(
        plan,
        collate,
        start_step=start,
        num_steps=stop,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    for batch in stream:
        yield put_rows(batch, mesh)


def token_collate(rows: Rows) -> Callable[[PlannedBatch], TokenBatch]:
    """Batches of NLL alone."""

    def collate(planned: PlannedBatch) -> TokenBatch:
        return _collate(_read_rows(rows, planned), planned)

    return collate


def pair_positions(rows: Rows, samples: SampleStore) -> np.ndarray:
    """Places that a pair takes: those of the longer of y and y-hat."""
    return np.maximum(rows.lengths, rows.prompt_lengths + samples.lengths) - 1


def pair_collate(rows: Rows, samples: SampleStore) -> Callable[[PlannedBatch], PairBatch]:
    """Batches of eq. 6: place i of ``samples`` holds the y-hat of place i of ``rows``."""

    def collate(planned: PlannedBatch) -> PairBatch:
        chosen = _read_rows(rows, planned)
        places = [row[0] if row else None for row in planned.rows]
        found = iter(samples.read([place for place in places if place is not None]))
        drawn = [None if place is None else next(found) for place in places]
        rejected: list[list[TokenRow]] = []
        for row, sample in zip(chosen, drawn, strict=True):
            if sample is None or sample.drop != KEPT:
                rejected.append([])
                continue
            if sample.row_id != row[0].row_id:
                raise ValueError(f"the sample of row {row[0].row_id} is of row {sample.row_id}")
            tokens = np.concatenate([row[0].prompt, sample.tokens])
            rejected.append([TokenRow(tokens, row[0].prompt_length, sample.row_id)])
        usable = [sample is not None and sample.drop == KEPT for sample in drawn]
        chosen_logps = [sample.reference_chosen if sample else 0.0 for sample in drawn]
        rejected_logps = [sample.reference_rejected if sample else 0.0 for sample in drawn]
        return PairBatch(
            chosen=_collate(chosen, planned),
            rejected=_collate(rejected, planned),
            reference_chosen_B=np.asarray(chosen_logps, np.float32),
            reference_rejected_B=np.asarray(rejected_logps, np.float32),
            pair_mask_B=np.asarray(usable, bool),
        )

    return collate


def _read_rows(rows: Rows, planned: PlannedBatch) -> list[list[TokenRow]]:
    """The examples of each row of a planned batch, read in one go."""
    found = iter(rows.read([place for row in planned.rows for place in row]))
    return [[next(found) for _ in row] for row in planned.rows]


def _collate(rows: list[list[TokenRow]], planned: PlannedBatch) -> TokenBatch:
    return collate_rows(rows, planned.length, planned.num_segments, len(planned.rows))
