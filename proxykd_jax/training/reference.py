"""log pi_ref of a round's pairs, computed once at the start of the round and stored.

In bfloat16 the log-prob of a sequence depends on how it is computed. Another batch shape, or a
program that keeps nothing for a backward pass, rounds differently and moves the sum by several
nats. The reference is therefore computed on the same batches as the round's first epoch, by the
forward pass that the training step differentiates (``_forward_of_step``).

In float32 this hardly matters, and the sampler already has the log-probs of y-hat. If those of the
first batch agree with the training forward pass, the rest are used too, and only y is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.data.collate import Rows
from proxykd_jax.data.order import EpochPlan, PlannedBatch
from proxykd_jax.errors import UserError
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.losses import reduce_tokens
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.peers import on_first, stop_if_wanted
from proxykd_jax.training.batches import (
    LastAnswers,
    Plan,
    Selection,
    placed_batches,
    token_collate,
)
from proxykd_jax.training.logprobs import label_logps, pair_label_logps, pair_sums
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import ModelSpec, Tree
from proxykd_jax.training.steps import split_rows
from proxykd_jax.types import Pairs, TokenBatch

LN_2 = math.log(2)
# Log-probs from sampling may differ from the training forward pass by this many nats per sequence.
_AGREEMENT = 1e-3


def store_references(
    store: SampleStore,
    plan: Plan,
    collate: Callable[[PlannedBatch], Pairs],
    model: Model,
    *,
    rows: Rows,
    plan_chosen: Callable[[Rows], Plan] | None,
    microbatches: int,
    batches_per_part: int,
    mesh: Mesh,
    report: Callable[[int, int], None],
) -> None:
    """Computes the parts of a store's reference log-probs that are missing.

    The first part is the first batch; it decides whether the sampler's log-probs can be used.

    Args:
      store: a store with all of its answers.
      plan: the round's batches.
      collate: as in training; the references in its batches are ignored.
      model: the proxy at the start of the round.
      rows: prompts with y, in the store's order.
      plan_chosen: rows -> batches of these rows without y-hat, one in a row; None if another model
        answered, because its log-probs cannot be used.
      microbatches: as in training.
      batches_per_part: batches in a part; a killed run loses at most one part.
      mesh: mesh that the rows are split over.
      report: called with (finished parts, all parts) after each part.

    Raises:
      UserError: a log-prob is not finite, or the stored parts leave out some pairs.
    """
    weights = (model.frozen, model.trainable)
    options: dict[str, Any] = {"spec": model.spec, "microbatches": microbatches}
    logps_of_pairs = functools.partial(pair_logps, *weights, **options)
    logps_of_chosen = functools.partial(answer_logps, *weights, **options)

    planned = plan(0)

    def of_pairs(batches: range) -> Sequence[np.ndarray]:
        return _computed(logps_of_pairs, planned, collate, batches, mesh)

    if 0 in store.missing_references(1 + len(planned)):
        store.append_references(0, *of_pairs(range(1)))
    first = [row[0] for row in planned[0].rows if row]
    left = np.setdiff1d(np.arange(len(store), dtype=np.int32), first)
    work, todo = of_pairs, range(1, len(planned))
    may_serve = plan_chosen is not None and len(left) > 0 and model.spec.dtype == "float32"
    if may_serve and on_first(lambda: sampled_logps_serve(*store.compare(first))):
        assert plan_chosen is not None
        others = Selection(LastAnswers(rows), left)
        planned_left, sampled_logps = plan_chosen(others)(0), store.sampled_logps
        collate_left = token_collate(others)

        def of_chosen(batches: range) -> Sequence[np.ndarray]:
            at, chosen = _computed(logps_of_chosen, planned_left, collate_left, batches, mesh)
            return left[at], chosen, sampled_logps[left[at]]

        work, todo = of_chosen, range(len(planned_left))
    num_parts = 1 + -(-len(todo) // batches_per_part)
    report(1, num_parts)
    for index in store.missing_references(num_parts):
        start = (index - 1) * batches_per_part
        store.append_references(index, *work(todo[start : start + batches_per_part]))
        report(index + 1, num_parts)
        stop_if_wanted()
    if store.num_references < len(store):
        raise UserError(
            f"{store.folder} has parts of reference log-probs that leave out some of its answers: "
            f"another version made them. Remove {store.folder} to sample again."
        )


def sampled_logps_serve(sampled: np.ndarray, computed: np.ndarray) -> bool:
    """Returns whether log-probs summed while sampling equal those of the training forward pass.

    Args:
      sampled: float32[n], log-probs of some answers; NaN if a server drew them.
      computed: float32[n], log-probs of the same answers by the training forward pass.

    Returns:
      True if n > 0 and all agree within 1e-3 nats.
    """
    gaps = np.abs(sampled - computed)
    return bool(len(gaps)) and bool((gaps <= _AGREEMENT).all())


def _computed(
    logps_of: Callable[[Any], tuple[jax.Array, ...]],
    planned: EpochPlan,
    collate: Callable[[PlannedBatch], Any],
    batches: range,
    mesh: Mesh,
) -> tuple[np.ndarray, ...]:
    """Returns the places of the examples in these batches, and their log-probs."""
    start, stop = batches.start, batches.stop
    placed = placed_batches(lambda epoch: planned, collate, start=start, stop=stop, mesh=mesh)
    found = fetch([logps_of(batch) for batch in placed])
    rows = [row for batch in planned[start:stop] for row in batch.rows]
    places = np.array([row[0] for row in rows if row], np.int32)
    return places, *np.concatenate(found, axis=1)[:, [bool(row) for row in rows]]


def check_first_dpo_loss(
    loss: float, spec: ModelSpec, *, beta: float, tokens: float, folder: Path
) -> None:
    """Checks that the loss is ln 2: before the first step policy and reference are one model.

    It is not checked under dropout, nor if it is 0 because no pair of the batch was usable.

    Args:
      loss: loss of eq. 4 at the first step, nats.
      spec: the static half of the model.
      beta: beta of eq. 4.
      tokens: mean number of tokens of a pair's two answers together.
      folder: folder of the round's answers, for the message.

    Raises:
      UserError: the loss is not ln 2 (see ``first_loss_tolerance``).
    """
    dropout = spec.config.lora is not None and spec.config.lora.dropout > 0
    if dropout or loss == 0.0:
        return
    tolerance = first_loss_tolerance(spec.dtype, beta=beta, tokens=tokens)
    if not abs(loss - LN_2) <= tolerance:
        raise UserError(
            f"The first DPO loss is {loss:.6f}, but before the first step the model is its own "
            f"reference, so it must be ln 2 = {LN_2:.6f} (within {tolerance:.4f} for "
            f"{spec.dtype} and {tokens:.0f} tokens a pair). Either the reference log-probs in "
            f"{folder} are those of another model, or this device computed them with another "
            f"rounding than the training step. Nothing was saved. Remove {folder} to compute them "
            "again; if the message returns, set the model's dtype: float32."
        )


def first_loss_tolerance(dtype: str, *, beta: float, tokens: float) -> float:
    """Returns how far the first DPO loss may be from ln 2, in nats.

    The loss moves by beta / 2 times the error of the pair's log-ratio. Errors of one rounding step
    of ``dtype`` per token add up as the square root of the number of tokens. The constant is
    the bound for float32.

    Args:
      dtype: precision of the computation.
      beta: beta of eq. 4.
      tokens: mean number of tokens of a pair's two answers together.
    """
    return 1e-3 + beta / 2 * float(jnp.finfo(dtype).eps) * math.sqrt(tokens)


@functools.partial(jax.jit, static_argnames=("spec", "microbatches"))
def pair_logps(
    frozen: Tree, trainable: Tree, batch: Pairs, *, spec: ModelSpec, microbatches: int
) -> tuple[jax.Array, jax.Array]:
    """Sums the log-probs of y and of y-hat, float32[B] each, by the training step's forward pass.

    There is no dropout. A row without an answer has 0.
    """

    def sums(trainable: Tree, part: Pairs) -> tuple[jax.Array, jax.Array]:
        return pair_sums(pair_label_logps(*spec.bind(frozen, trainable), part, spec), part)

    return _forward_of_step(sums, frozen, trainable, batch, spec, microbatches)


@functools.partial(jax.jit, static_argnames=("spec", "microbatches"))
def answer_logps(
    frozen: Tree, trainable: Tree, batch: TokenBatch, *, spec: ModelSpec, microbatches: int
) -> tuple[jax.Array]:
    """Sums the log-probs of rows with one answer each, float32[B], as ``pair_logps`` does."""

    def sums(trainable: Tree, part: TokenBatch) -> tuple[jax.Array]:
        logps_BL, _, _ = label_logps(*spec.bind(frozen, trainable), part, spec)
        return (reduce_tokens(logps_BL, part.mask_BL, reduction="sum"),)

    return _forward_of_step(sums, frozen, trainable, batch, spec, microbatches)


def _forward_of_step(
    sums: Callable[[Tree, Any], Any],
    frozen: Tree,
    trainable: Tree,
    batch: Any,
    spec: ModelSpec,
    microbatches: int,
) -> Any:
    """Computes ``sums(trainable, rows)`` of all rows, rounded as the training step rounds them.

    A compiler keeps more digits between operations that it fuses, and it fuses differently if
    results are kept for a backward pass. Below float32 the forward pass therefore keeps what the
    backward pass would read. A branch that is never taken reads it, so no compiler can remove it.
    The log-probs then equal those of the step bit by bit on a CPU (tests/training). In float32 the
    plain forward pass is within 1e-3 nats a sequence and takes half of the time.
    """

    def of_part(part: Any) -> Any:
        if spec.dtype == "float32":
            return sums(trainable, part)
        found, backward = jax.vjp(lambda trainable: sums(trainable, part), trainable)
        given = {id(leaf) for leaf in jax.tree.leaves((frozen, trainable, part))}
        kept = [leaf for leaf in jax.tree.leaves(backward) if id(leaf) not in given]
        never = jnp.any(jax.tree.leaves(part)[0] < 0)  # no token id is, but no compiler knows
        return jax.lax.cond(never, _read, lambda _, found: found, kept, found)

    if microbatches == 1:
        return of_part(batch)
    found_AB = jax.lax.map(of_part, split_rows(batch, microbatches))
    return jax.tree.map(lambda x_AB: x_AB.swapaxes(0, 1).reshape(-1), found_AB)


def _read(kept: list[jax.Array], found: Any) -> Any:
    """Returns ``found`` as a function of everything that was kept."""
    total = sum((jnp.sum(x.astype(jnp.float32)) for x in kept), jnp.zeros(()))
    return jax.tree.map(lambda x: x + total, found)
