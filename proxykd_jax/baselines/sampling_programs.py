"""The programs of a student that answers during training, from array shapes alone.

The program ``answer`` draws the answers on the mesh of ``StageRun.sample_mesh``. A sketch does not
know the size of the tokenizer, so it assumes the models' whole vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from proxykd_jax.baselines.rollouts import AnswerBatch
from proxykd_jax.config.method_section import AnsweringSection
from proxykd_jax.generation.decode import DrawSettings, Mixing
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.models.operations import forward_flops
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.training.abstract import (
    Cost,
    Lengths,
    Program,
    abstract_rows,
    answering_program,
    state_of,
    step_cost,
    step_program,
    weights_read,
    while_drawing,
)
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import longest
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import Tree


def answer_shapes(rows: int, length: int) -> AnswerBatch:
    """Returns the shapes of a batch of answers."""
    flags = jax.ShapeDtypeStruct((rows,), jnp.bool_)
    return AnswerBatch(abstract_rows(rows, length), flags, flags)


def answer_program(
    run: StageRun,
    method: AnsweringSection,
    phase: Phase,
    *,
    temperature: float,
    times: float,
    beside: Tree,
    mixing: Mixing | None = None,
) -> Program:
    """Returns the program that draws the student's answers as ``rollouts.Answering`` does.

    Args:
      run, method: a sketch of a stage, and its method.
      phase: the phase whose state is held meanwhile.
      temperature, mixing: as in ``Answering``.
      times: answers for each row of the corpus.
      beside: the shapes of what stays on the training mesh besides the student, its optimizer and
        a model that is mixed in.
    """
    model, other = run.model, None if mixing is None else run.scorer

    def resident(mesh: Mesh) -> int:
        own, moved = while_drawing(run, dict(mesh.shape))
        held = [state_of(phase).opt_state, beside]
        if moved:
            held += [
                (model.frozen, model.trainable),
                None if other is None else other.weight_shapes,
            ]
        elif model.spec.trainable == "full" and model.spec.dtype != "float32":
            held.append(model.trainable)  # a cast copy of the weights answers
        return bytes_per_device(held, own)

    return answering_program(
        "answer",
        run.config.mesh.drawing(run.stage),
        model,
        method.sample_batch_size,
        budget=LengthBudget(run.config.corpus.max_length, method.max_new_tokens),
        settings=DrawSettings(temperature, 1.0, run.corpus.vocab_size, (0,), mixing),
        resident=resident,
        other=other,
        times=times,
    )


def scored_answer_program(
    run: StageRun,
    method: AnsweringSection,
    phase: Phase,
    *,
    temperature: float = 1.0,
    times: float = 1.0,
    mixing: Mixing | None = None,
) -> Program:
    """Returns ``answer_program`` with the scorer loaded too."""
    return answer_program(
        run,
        method,
        phase,
        temperature=temperature,
        times=times,
        beside=scorer_of(run).weight_shapes if mixing is None else (),
        mixing=mixing,
    )


def scored_step_program(
    run: StageRun,
    phase: Phase,
    name: str = "distill",
    batch_of: Callable[[int], Any] | None = None,
    *,
    answers: int = 1,
    times: float = 1.0,
) -> Program:
    """Returns a step on ``answers`` answers to each of its rows, which the scorer reads too."""
    state, length = state_of(phase), longest(run)

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        own = step_cost(run.model, axes, answers * rows, lengths.row, state=state)
        seen = scorer_cost(run, axes, answers * rows, lengths)
        return Cost(own.flops + seen.flops, own.bytes_moved + seen.bytes_moved)

    return step_program(
        run,
        phase,
        name,
        batch_of or (lambda rows: answer_shapes(answers * rows, length)),
        cost=cost,
        times=times,
    )


def scorer_cost(run: StageRun, axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
    """Returns the cost of the scorer's forward pass over rows."""
    scorer = scorer_of(run)
    flops = forward_flops(scorer.spec.config, rows, lengths.row)
    return Cost(flops, weights_read(scorer, axes))


def scorer_of(run: StageRun) -> Model:
    """Returns the proxy's shapes.

    Raises:
      ValueError: the run is not a sketch.
    """
    if run.scorer is None:
        raise ValueError("Programs are made from a sketch of a run, which has the scorer's shapes.")
    return run.scorer
