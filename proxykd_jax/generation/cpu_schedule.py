"""How one CPU device samples; ``sampler.py`` has the plain path.

The rows of a batch are divided among the cores, and each part shrinks by quarters. Each layer has
arrays of its own. The cache starts small and grows when it is full. Growing copies the cache, so on
other devices it would need the memory of both copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from proxykd_jax.generation.decode import DecodeState, PromptBatch, join_rows
from proxykd_jax.generation.shapes import prompt_bucket
from proxykd_jax.parallel import cpu

if TYPE_CHECKING:
    from proxykd_jax.generation.sampler import Batches

# A batch is divided among cores only while each core gets at least this many rows.
_FEWEST_ROWS_OF_A_CORE = 16
# Initial slots, and the least number added at once; each size is compiled.
_FIRST_SLOTS = 64
_FEWEST_MORE = 32
# The slots of joined prompts are a multiple of this.
_SLOTS_OF_PROMPTS = 16
# Models with more layers use fewer sizes: 30 unrolled layers take 7 s to compile.
_FEW_LAYERS = 12
# Short prompts of a batch run separately if that saves this many FLOPs, since it compiles a shape.
_WORTH_A_PROGRAM = 2e10

_T = TypeVar("_T")


@dataclass(frozen=True)
class CpuSchedule:
    """How one CPU device runs batches of prompts.

    Attributes:
      cores: number of cores among which a batch is divided.
      part_size: most rows of a core's part.
      between: rows and slots also use sizes between the powers of two.
    """

    cores: int
    part_size: int
    between: bool

    def answers(self, answer: Callable[[list[int]], _T], batches: list[list[int]]) -> Iterator[_T]:
        """``answer`` of each core's part of each batch, as many parts at a time as cores."""
        parts = []
        for rows in batches:
            # The last batch, too, is divided among as many cores as its rows allow.
            allowed = min(self.cores, len(rows) // _FEWEST_ROWS_OF_A_CORE)
            count = max(-(-len(rows) // self.part_size), allowed)
            parts += [rows[first::count] for first in range(count)]  # short and long ones in each
        return _side_by_side(answer, parts, self.cores)

    def run_prompts(
        self, batches: Batches, rows: list[int], batch: PromptBatch, most_slots: int
    ) -> DecodeState:
        """The state after the prompts of ``rows``, in a cache that may have to grow.

        Short prompts run separately from long ones if that saves enough padding.

        Args:
          batches: runs prompts.
          rows: numbers of the prompts.
          batch: all of them together.
          most_slots: slots that the rows need in the end.
        """
        num_rows, length = batch.tokens_BL.shape
        lengths = [len(batches.prompts[i].tokens) for i in rows]
        flops = 2.0 * batches.config.num_params
        cut = _cut_by_length(lengths, batches.row_counts, num_rows * length, flops)
        if cut is None:
            return batches.run_prompts(batch, self.more_slots(length, most_slots))
        by_length = sorted(range(len(rows)), key=lengths.__getitem__)
        states, places, count = [], np.full(num_rows, -1, np.int32), 0
        for part in (by_length[:cut], by_length[cut:]):
            batch, _ = batches.prompts_of([rows[place] for place in part])
            states.append(batches.run_prompts(batch, batch.tokens_BL.shape[1]))
            places[part] = count + np.arange(len(part))
            count += len(batch.tokens_BL)
        filled = -(-max(lengths) // _SLOTS_OF_PROMPTS) * _SLOTS_OF_PROMPTS
        with batches.launch_lock:
            slots = self.more_slots(filled, most_slots)
            return join_rows(tuple(states), places, filled=filled, slots=slots)

    def more_slots(self, filled: int, most: int) -> int:
        """Next size of a cache whose ``filled`` slots are full; see ``next_slots``."""
        return next_slots(filled, most, self.between)


def find_cpu_schedule(
    params: Any, *, num_layers: int, batch_size: int, rows_multiple: int
) -> CpuSchedule | None:
    """The schedule if one CPU device computes; None otherwise.

    Args:
      params: weights on their devices.
      num_layers: of the model.
      batch_size, rows_multiple: as in ``sample``.
    """
    if not _is_one_cpu(params):
        return None
    cores = _cores(batch_size) if rows_multiple == 1 else 1
    return CpuSchedule(cores, -(-batch_size // cores), num_layers <= _FEW_LAYERS)


def next_slots(filled: int, most: int, between: bool) -> int:
    """Next size of a cache whose ``filled`` slots are full and that needs ``most`` in the end.

    Sizes are 64, 128, 256, ..., and with ``between`` also 96, 192, .... Small steps help because
    every token reads all slots; few sizes help because each is compiled.
    """
    wanted = filled + _FEWEST_MORE
    size = 1 << (wanted - 1).bit_length()
    if between and wanted <= size * 3 // 4:
        size = size * 3 // 4
    return min(max(size, _FIRST_SLOTS), most)


def _is_one_cpu(params: Any) -> bool:
    devices = {
        device
        for array in jax.tree.leaves(params)
        for device in (array.devices() if isinstance(array, jax.Array) else jax.local_devices())
    }
    return len(devices) == 1 and devices.pop().platform == "cpu"


def _cores(batch_size: int) -> int:
    """Number of cores among which one CPU device's batch is divided.

    With one query per row, attention is two small products per row and head, and XLA runs them one
    after another on one core. Programs of two threads use two cores (64 rows, 256 slots, 6 layers
    of 6 heads of 48: 18 ms on one core, 9 on two).
    """
    return max(1, min(len(cpu.cores()), batch_size // _FEWEST_ROWS_OF_A_CORE))


def _side_by_side(
    work: Callable[[list[int]], _T], parts: list[list[int]], cores: int
) -> Iterator[_T]:
    """``work`` of each part, in order, at most ``cores`` at a time; none starts after an error."""
    if cores == 1:
        yield from map(work, parts)
        return
    pool = ThreadPoolExecutor(cores, thread_name_prefix="sampler")
    try:
        yield from pool.map(work, parts)
    finally:
        pool.shutdown(cancel_futures=True)


def _cut_by_length(
    lengths: list[int], row_counts: list[int], whole: int, flops_a_position: float
) -> int | None:
    """How many of the shortest prompts run separately from the others; None to run all together,
    which takes ``whole`` positions with padding."""
    ordered = sorted(lengths)

    def positions(some: list[int]) -> int:
        count = min(count for count in row_counts if count >= len(some))
        return count * prompt_bucket(some[-1])

    cuts = [
        place
        for place in range(1, len(ordered))
        if prompt_bucket(ordered[place - 1]) < prompt_bucket(ordered[place])
    ]
    costs = {cut: positions(ordered[:cut]) + positions(ordered[cut:]) for cut in cuts}
    best = min(costs, key=costs.__getitem__, default=None)
    if best is None or (whole - costs[best]) * flops_a_position < _WORTH_A_PROGRAM:
        return None
    return best
