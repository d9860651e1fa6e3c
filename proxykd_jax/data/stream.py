"""Batches from any global step on, collated and prefetched by tf.data.

The order is a plan (``order.py``), so the stream has no state to save: a step determines its batch.
tf.data collates in threads, ahead of the training step. Importing TensorFlow takes seconds. Until
it is imported, batches are collated on demand, so the first steps do not wait.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from proxykd_jax.data.order import PlannedBatch, default_buckets, plan_epoch
from proxykd_jax.errors import UserError

__all__ = ["BatchStream", "PlannedBatch", "default_buckets", "plan_epoch", "process_rows"]

_THREADS = 2
_ENDLESS = 1 << 62


class BatchStream:
    """An iterable of collated batches. Each iteration starts at ``start_step``.

    Step g counts batches over all epochs from 0: epoch 0 has the steps below
    ``len(plan_of_epoch(0))``, and so on.

    Args:
      plan_of_epoch: the batches of an epoch, the same on every process.
      collate: maps a planned batch to a pytree of NumPy arrays. It gets this process's rows of the
        global batch, may run in several threads at once, and must return the same structure and
        dtypes for every batch (shapes may differ).
      start_step: first step to yield.
      num_steps: the step to stop before, so that a resumed stream differs only in ``start_step``
        (None: never stop).
      process_index, process_count: this process and the number of processes, which get equal parts
        of each batch's rows.
      prefetch: number of batches made ahead.

    Raises:
      UserError: the rows of a batch cannot be divided among the processes.
      ValueError: an epoch has no batches.
    """

    def __init__(
        self,
        plan_of_epoch: Callable[[int], Sequence[PlannedBatch]],
        collate: Callable[[PlannedBatch], Any],
        start_step: int = 0,
        num_steps: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        prefetch: int = 2,
    ) -> None:
        self._plan_of_epoch = plan_of_epoch
        self._collate = collate
        self._start_step = start_step
        self._num_steps = num_steps
        self._process_index = process_index
        self._process_count = process_count
        self._prefetch = prefetch
        self._lock = threading.Lock()
        self._starts = [0]  # first step of each epoch seen so far, and of the next one
        self._plans: dict[int, Sequence[PlannedBatch]] = {}

    def planned(self, step: int) -> PlannedBatch:
        """This process's part of the batch of a global step."""
        with self._lock:
            epoch = 0
            while step >= self._starts[-1]:
                epoch = len(self._starts) - 1
                self._starts.append(self._starts[-1] + len(self._plan(epoch)))
                if self._starts[-1] == self._starts[-2]:
                    raise ValueError(f"Epoch {epoch} has no batches.")
            epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
            batch = self._plan(epoch)[step - self._starts[epoch]]
        return process_rows(batch, self._process_index, self._process_count)

    def __iter__(self) -> Iterator[Any]:
        import jax

        stop = _ENDLESS if self._num_steps is None else self._num_steps
        if self._start_step >= stop:
            return
        structure: Any
        first_leaves, structure = jax.tree.flatten(self._collate(self.planned(self._start_step)))
        dtypes = [np.asarray(leaf).dtype for leaf in first_leaves]
        failure: list[BaseException] = []

        def leaves_of(step: Any) -> list[np.ndarray]:
            try:
                leaves, found = jax.tree.flatten(self._collate(self.planned(int(step))))
                if structure != found:
                    raise ValueError(f"Step {step} has another structure than the first batch.")
                return [np.asarray(leaf, dtype) for leaf, dtype in zip(leaves, dtypes, strict=True)]
            except BaseException as error:
                failure.append(error)
                raise

        # Not a daemon: a process that ends during an import of compiled code could crash.
        importing = threading.Thread(target=import_tensorflow, name="import tensorflow")
        importing.start()
        step = self._start_step
        while step < stop and importing.is_alive():
            yield jax.tree.unflatten(structure, leaves_of(step))
            step += 1
        if step == stop:
            return
        tf = import_tensorflow()
        dataset = (
            tf.data.Dataset.range(step, stop)
            .map(
                lambda step: tuple(tf.numpy_function(leaves_of, [step], dtypes)),
                num_parallel_calls=_THREADS,
                deterministic=True,
            )
            .prefetch(self._prefetch)
        )
        options = tf.data.Options()
        options.threading.private_threadpool_size = _THREADS
        options.autotune.enabled = False
        try:
            for leaves in dataset.with_options(options).as_numpy_iterator():
                yield jax.tree.unflatten(structure, leaves)
        except tf.errors.OpError as error:
            # Raise the original exception, not TensorFlow's report of it.
            raise (failure[0] if failure else error) from None

    def _plan(self, epoch: int) -> Sequence[PlannedBatch]:
        if epoch not in self._plans:
            # Steps come in order except for prefetched ones, so two epochs are enough.
            self._plans = {e: plan for e, plan in self._plans.items() if e == epoch - 1}
            self._plans[epoch] = self._plan_of_epoch(epoch)
        return self._plans[epoch]


def process_rows(batch: PlannedBatch, process_index: int, process_count: int) -> PlannedBatch:
    """The rows of a global batch that one process computes: contiguous and equally many.

    Raises:
      UserError: the rows cannot be divided.
    """
    if len(batch.rows) % process_count:
        raise UserError(
            f"A batch of {len(batch.rows)} rows cannot be divided among {process_count} "
            f"processes; use a batch_size that is a multiple of {process_count}."
        )
    each = len(batch.rows) // process_count
    mine = batch.rows[process_index * each : (process_index + 1) * each]
    return dataclasses.replace(batch, rows=mine)


def import_tensorflow() -> Any:
    """TensorFlow, restricted to the CPU because jax uses the devices. First call takes seconds."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow as tf

    try:
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    except RuntimeError:
        # Too late: other code has already initialised TensorFlow's devices.
        pass
    return tf
