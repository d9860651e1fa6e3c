"""The programs of a stage's phases from array shapes alone, as its steps would start them.

Nothing is loaded (see ``training.abstract``). Programs that only one method starts are defined in
the method's own file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import PreferenceConfig
from proxykd_jax.data.order import default_buckets, packed_segments
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.label_batch import hidden_rows, soft_labels_of_hidden
from proxykd_jax.generation.label_rows import positions_at_once
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.losses import REFERENCE_LOSSES
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.operations import forward_flops, head_flops, layer_flops
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.training.abstract import (
    Cost,
    Lengths,
    Program,
    abstract_rows,
    answering_program,
    place,
    place_rows,
    state_of,
    step_program,
    weight_bytes,
    weights_read,
    while_drawing,
)
from proxykd_jax.training.batch_objectives import AlignObjective
from proxykd_jax.training.model import Model
from proxykd_jax.training.pairs import may_share_prompt, shares_prompt
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.types import DistillBatch, PairBatch, Pairs, SharedPairBatch, TokenBatch

if TYPE_CHECKING:
    from proxykd_jax.training.phase import Phase
    from proxykd_jax.training.stage_run import StageRun


def text_programs(run: StageRun, name: str, phase: Phase) -> list[Program]:
    """Returns the step on texts."""
    return [step_program(run, phase, name, rows_of(run))]


def label_programs(run: StageRun, ids: int, phase: Phase, **options: Any) -> list[Program]:
    """Returns the step on texts with soft labels of ``ids`` ids per position."""
    return [step_program(run, phase, "distill", labels_of(run, ids), **options)]


def round_programs(run: StageRun, phase: Phase) -> list[Program]:
    """Returns a round's programs: the proxy's answers, reference log-probs, the step on pairs."""
    found = [sampling_program(run, run.model, phase)]
    if run.config.align.preference.loss in REFERENCE_LOSSES:
        found.append(_reference(run, phase))
    return [*found, pair_program(run, phase, "round")]


def pair_program(run: StageRun, phase: Phase, name: str) -> Program:
    """Returns the step on pairs."""
    objective = phase.objective
    assert isinstance(objective, AlignObjective)
    pair, length = (objective.preference, phase.spec.config), longest(run)
    return step_program(
        run,
        phase,
        name,
        lambda rows: _pairs(rows, length, may_share_prompt(*pair)),
        rows_of=lambda lengths: _rows_of_pair(lengths, *pair),
    )


def longest(run: StageRun) -> int:
    """Returns the positions of the longest rows."""
    return default_buckets(run.config.corpus.max_length)[-1]


# --- batches --------------------------------------------------------------------------------------


def rows_of(run: StageRun) -> Callable[[int], TokenBatch]:
    """Returns a function from a number of rows to the shapes of such a batch of the stage."""
    length = longest(run)
    # Assumes packed rows of as many examples as half the length would allow.
    packed = run.section.batching == "pack"
    segments = packed_segments(np.array([length // 2]), length) if packed else 1
    return lambda rows: abstract_rows(rows, length, segments)


def _pairs(rows: int, length: int, share_prompt: bool) -> Pairs:
    """Returns the largest pairs: both answers in one row, if a round may choose that layout."""
    logps = jax.ShapeDtypeStruct((rows,), jnp.float32)
    rest = (logps, logps, jax.ShapeDtypeStruct((rows,), jnp.bool_))
    if not share_prompt:
        return PairBatch(abstract_rows(rows, length), abstract_rows(rows, length), *rest)
    prefix_B = jax.ShapeDtypeStruct((rows,), jnp.int32)
    both = abstract_rows(rows, 2 * length, num_segments=2).replace(prefix_B=prefix_B)  # type: ignore[attr-defined]
    return SharedPairBatch(both, *rest)


def _rows_of_pair(
    lengths: Lengths, preference: PreferenceConfig, model: ModelConfig
) -> tuple[int, int]:
    """Returns (rows of a pair, tokens of each row)."""
    prompt, answer = np.array([lengths.prompt]), np.array([lengths.answer])
    shared = shares_prompt(preference, model, prompt, answer, answer)
    return (1, lengths.row + lengths.answer) if shared else (2, lengths.row)


def labels_of(run: StageRun, top_k: int) -> Callable[[int], DistillBatch]:
    """Returns a function from a number of rows to the shapes of a batch with soft labels."""
    length, batch_of = longest(run), rows_of(run)

    def batch(rows: int) -> DistillBatch:
        tokens = batch_of(rows)
        segments = tokens.example_mask_BS.shape
        shape = (rows, length, top_k)
        return DistillBatch(
            tokens,
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape[:2], jnp.float32),
            jax.ShapeDtypeStruct(segments, jnp.float32),
            jax.ShapeDtypeStruct(segments, jnp.bool_),
        )

    return batch


# --- programs -------------------------------------------------------------------------------------


def sampling_program(run: StageRun, model: Model, phase: Phase | None) -> Program:
    """Returns the program that draws answers of the proxy, or of the student for SODA.

    Args:
      run: a sketch.
      model: the model that answers.
      phase: the phase whose optimizer state is held meanwhile; None before any training.
    """
    config = run.config
    sampling = config.align.sampling

    def resident(mesh: Mesh) -> int:
        """The optimizer's state, and the trained weights if sampling has another sharding."""
        own, moved = while_drawing(run, dict(mesh.shape))
        held = 0 if phase is None else bytes_per_device(state_of(phase).opt_state, own)
        return held + (bytes_per_device((model.frozen, model.trainable), own) if moved else 0)

    vocab_size = model.spec.config.vocab_size
    return answering_program(
        "sample",
        config.mesh.drawing(run.stage),
        model,
        sampling.batch_size,
        budget=LengthBudget(config.corpus.max_length, sampling.max_new_tokens),
        settings=DrawSettings(sampling.temperature, sampling.top_p, vocab_size, (0,)),
        resident=resident,
    )


def _reference(run: StageRun, phase: Phase) -> Program:
    align, model, length = run.config.align, run.model, longest(run)
    pair = (align.preference, model.spec.config)

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        weights = (place(tree, mesh) for tree in (model.frozen, model.trainable))
        batch = place_rows(_pairs(rows, length, may_share_prompt(*pair)), mesh)
        return [pair_logps.lower(*weights, batch, spec=model.spec, microbatches=1)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        number, length = _rows_of_pair(lengths, *pair)
        flops = forward_flops(model.spec.config, number * rows, length)
        return Cost(flops, weights_read(model, axes))

    def resident(mesh: Mesh) -> int:
        return bytes_per_device(state_of(phase).opt_state, dict(mesh.shape))

    rows = align.batch_size // align.microbatches
    size = model.spec.config.num_params
    held = functools.partial(weight_bytes, model)
    return Program("reference", "align", size, rows, lower, held, resident, cost)


def scoring_program(run: StageRun) -> Program:
    """Returns the program that computes the aligned proxy's soft labels."""
    model, length = run.model, longest(run)
    spec, score = model.spec, run.config.score

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        params, adapter = (place(tree, mesh) for tree in model.weight_shapes)
        batch = place_rows(abstract_rows(rows, length), mesh)
        hidden = hidden_rows.lower(params, adapter, batch, config=spec.config)
        states = jax.ShapeDtypeStruct((size, spec.config.model_dim), jnp.dtype(spec.dtype))
        project = soft_labels_of_hidden.lower(
            params,
            states,
            jax.ShapeDtypeStruct((size,), jnp.int32),
            config=spec.config,
            top_k=score.top_k,
            temperature=score.temperature,
        )
        return [hidden, project]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        flops = layer_flops(spec.config, rows, lengths.row)
        flops += head_flops(spec.config, rows * lengths.answer)
        return Cost(flops, weights_read(model, axes))

    size = positions_at_once(spec.config.vocab_size)
    return Program(
        "score",
        "score",
        spec.config.num_params,
        score.batch_size,
        lower,
        functools.partial(weight_bytes, model),
        lambda mesh: 0,
        cost,
        lambda rows, lengths: (1.0, rows * lengths.answer / size),
    )
