"""log pi_ref of a round's pairs: computed once, at the round's start, and stored.

In bfloat16 the log-prob of a sequence depends on the shape of the batch that it is computed in: a
product of another size takes another kernel, which moves the sum by up to a nat. So the reference
sees the very batches of the round's first epoch, as the training step will.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.data.order import PlannedBatch
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.peers import stop_if_wanted
from proxykd_jax.training.batches import Plan, placed_batches
from proxykd_jax.training.logprobs import pair_label_logps, pair_sums
from proxykd_jax.training.state import ModelSpec, Tree
from proxykd_jax.training.steps import split_rows
from proxykd_jax.types import Pairs

LN_2 = math.log(2)


def store_references(
    store: SampleStore,
    plan: Plan,
    collate: Callable[[PlannedBatch], Pairs],
    spec: ModelSpec,
    params: Tree,
    adapter: Tree | None,
    *,
    microbatches: int,
    batches_per_part: int,
    mesh: Mesh,
    report: Callable[[int, int], None],
) -> None:
    """Makes the parts of a store's reference log-probs that are not there yet.

    Args:
      store: all of whose answers are there.
      plan: the round's batches.
      collate: as in training; the references in its batches are not looked at.
      spec, params, adapter: the proxy that the round begins with.
      microbatches: as in training.
      batches_per_part: a killed run loses at most so many batches.
      mesh: over which the rows are split.
      report: called with (parts there, all parts) after each.

    Raises:
      UserError: a log-prob is no finite number.
    """
    planned = plan(0)
    num_parts = -(-len(planned) // batches_per_part)
    for index in store.missing_references(num_parts):
        start = index * batches_per_part
        stop = min(start + batches_per_part, len(planned))
        pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in placed_batches(plan, collate, start=start, stop=stop, mesh=mesh):
            found = pair_logps(params, adapter, batch, spec=spec, microbatches=microbatches)
            pairs.append(fetch(found))
        rows = [row for batch in planned[start:stop] for row in batch.rows]
        chosen, rejected = np.concatenate(pairs, axis=1)[:, [bool(row) for row in rows]]
        places = np.array([row[0] for row in rows if row], np.int32)
        store.append_references(index, places, chosen, rejected)
        report(index + 1, num_parts)
        stop_if_wanted()


def check_first_dpo_loss(loss: float, spec: ModelSpec) -> None:
    """Before the first step policy and reference are one model, so the loss is ln 2.

    Under dropout they are not; 0 says that no pair of the batch was usable.

    Raises:
      RuntimeError: it is another number.
    """
    dropout = spec.config.lora is not None and spec.config.lora.dropout > 0
    if dropout or loss == 0.0:
        return
    if not abs(loss - LN_2) < 1e-3:
        raise RuntimeError(
            f"the first DPO loss is {loss:.6f}, not ln 2 = {LN_2:.6f}: the stored reference "
            "log-probs are not those of the model that training began with"
        )


@functools.partial(jax.jit, static_argnames=("spec", "microbatches"))
def pair_logps(
    params: Tree, adapter: Tree | None, batch: Pairs, *, spec: ModelSpec, microbatches: int
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of y and of y-hat, float32[B] each, by the training step's forward pass.

    Without dropout, and 0 for a row without an answer.
    """

    def forward(part: Pairs) -> tuple[jax.Array, jax.Array]:
        return pair_sums(pair_label_logps(params, adapter, part, spec), part)

    if microbatches == 1:
        return forward(batch)
    chosen_AB, rejected_AB = jax.lax.map(forward, split_rows(batch, microbatches))
    return chosen_AB.swapaxes(0, 1).reshape(-1), rejected_AB.swapaxes(0, 1).reshape(-1)
