"""One training step: gradients of an objective, accumulated over micro-batches, and Adam."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from proxykd_jax.losses import batch_mean
from proxykd_jax.random_keys import step_key
from proxykd_jax.training.batch_objectives import Objective
from proxykd_jax.training.state import Spec, TrainState, Tree

# All rounds share one compiled step, because a compiled step depends only on the arguments.
_compiled_once = functools.lru_cache(maxsize=16)

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Tree, Any], tuple[TrainState, Metrics]]


@_compiled_once
def make_train_step(
    spec: Spec,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int,
    seed: int,
) -> Step:
    """Returns a jitted ``step(state, frozen, batch) -> (state, metrics)`` that donates the state.

    Args:
      spec: the static half of the model, or of the models that the objective reads.
      objective: what is minimised.
      optimizer: from ``make_optimizer``.
      microbatches: number of parts that the batch's rows are cut into and computed one by one.
      seed: seed of LoRA dropout; the key is a function of it and of the step.

    Returns:
      The step. Its metrics are float32 scalars: ``loss``, ``grad_norm``, ``update_norm`` and the
      objective's.
    """

    def step(state: TrainState, frozen: Tree, batch: Any) -> tuple[TrainState, Metrics]:
        key = None
        if spec.config.lora is not None and spec.config.lora.dropout > 0:
            key = step_key(seed, state.step)
        loss, grads, terms = _gradients(
            spec, objective, state.trainable, frozen, batch, microbatches, key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {
            "loss": loss,
            **{name: batch_mean(term) for name, term in terms.items()},
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    return jax.jit(step, donate_argnums=0)


@_compiled_once
def make_diagnosis(
    spec: Spec, objective: Objective, *, microbatches: int
) -> Callable[[TrainState, Tree, Any], Metrics]:
    """Returns ``diagnose(state, frozen, batch)``: each weighted term's gradient norm, and ratios.

    It costs one backward pass per term, so the trainer calls it every ``diagnose_every`` steps and
    outside the timed step.
    """
    terms = objective.terms()

    def diagnose(state: TrainState, frozen: Tree, batch: Any) -> Metrics:
        norms = {}
        for name, term in terms.items():
            _, grads, _ = _gradients(spec, term, state.trainable, frozen, batch, microbatches, None)
            norms[f"grad_norm/{name}"] = optax.tree.norm(grads)
        names = list(norms)
        if len(names) == 2:
            ratio = norms[names[1]] / jnp.maximum(norms[names[0]], 1e-30)
            first, second = (name.removeprefix("grad_norm/") for name in names)
            norms[f"grad_norm/{second}_to_{first}"] = ratio
        return norms

    return jax.jit(diagnose)


@_compiled_once
def make_evaluation(
    spec: Spec, objective: Objective
) -> Callable[[TrainState, Tree, Any], dict[str, Any]]:
    """Returns ``evaluate(state, frozen, batch)``: the objective's metrics, as one ``Term`` each."""

    def evaluate(state: TrainState, frozen: Tree, batch: Any) -> dict[str, Any]:
        models = spec.bind(frozen, state.trainable)
        return objective.share(models, batch, objective.counts(batch), spec, None)[1]

    return jax.jit(evaluate)


def split_rows(batch: Any, microbatches: int) -> Any:
    """Cuts [B, ...] into [A, B / A, ...]: row r goes to part r mod A and stays on its device.

    Raises:
      ValueError: rows share their answers' positions, which cannot be cut with them.
    """
    counts = {x.shape[0] for x in jax.tree.leaves(batch)}
    if len(counts) > 1:
        raise ValueError(f"Arrays of {sorted(counts)} rows cannot be cut into the same parts.")
    return jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)


def _gradients(
    spec: Spec,
    objective: Objective,
    trainable: Tree,
    frozen: Tree,
    batch: Any,
    microbatches: int,
    key: jax.Array | None,
) -> tuple[jax.Array, Tree, dict[str, Any]]:
    counts = objective.counts(batch)

    def share(trainable: Tree, part: Any, key: jax.Array | None) -> tuple[jax.Array, Any]:
        return objective.share(spec.bind(frozen, trainable), part, counts, spec, key)

    value_and_grad = jax.value_and_grad(share, has_aux=True)
    if microbatches == 1:
        (loss, terms), grads = value_and_grad(trainable, batch, key)
        return loss, grads, terms
    parts = split_rows(batch, microbatches)

    def accumulate(total: Any, xs: Any) -> tuple[Any, None]:
        index, part = xs
        part_key = None if key is None else jax.random.fold_in(key, index)
        (loss, terms), grads = value_and_grad(trainable, part, part_key)
        return jax.tree.map(jnp.add, total, (loss, grads, terms)), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(value_and_grad, trainable, first, key)
    (loss, terms), grads = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(accumulate, (loss, grads, terms), (jnp.arange(microbatches), parts))
    return total
