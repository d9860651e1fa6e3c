"""The programs of a run from shapes alone, as its stages would start them.

Nothing is loaded: weights, states and batches are abstract arrays with the shardings that the
table gives them. What a student starts that answers while it trains is in ``baselines.programs``,
whose ``run_programs`` has all of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.config import Config, PreferenceConfig, TrainingSection, Work
from proxykd_jax.data.order import default_buckets, packed_segments
from proxykd_jax.generation.decode import DrawSettings
from proxykd_jax.generation.score_rows import positions_at_once
from proxykd_jax.generation.scoring import hidden_rows, soft_labels_of_hidden
from proxykd_jax.losses import REFERENCE_LOSSES
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.cost import forward_flops, head_flops, layer_flops, step_flops
from proxykd_jax.parallel.sharding import bytes_per_device
from proxykd_jax.training.abstract import (
    AbstractModel,
    Cost,
    Lengths,
    Program,
    abstract_model,
    abstract_rows,
    answering_program,
    place,
    place_rows,
    step_program,
    weights_read,
)
from proxykd_jax.training.objectives import (
    AlignObjective,
    DistillObjective,
    NllObjective,
    Objective,
)
from proxykd_jax.training.pairs import may_share_prompt, shares_prompt
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.types import DistillBatch, PairBatch, Pairs, SharedPairBatch, TokenBatch


def programs(config: Config, proxy: ModelConfig, student: ModelConfig) -> list[Program]:
    """The programs of a run in the order of its stages; those that it would not start are left out.

    Args:
      config: of the run.
      proxy, student: architectures, with ``lora`` set where an adapter is trained.
    """
    distill = config.distill
    length = default_buckets(config.corpus.max_length)[-1]
    found = []
    if config.needs != "nothing":
        teacher = abstract_model(proxy, config.proxy, config.align)
        found += _of_the_proxy(config, teacher, length)
    pupil = abstract_model(student, config.student, distill)
    if config.needs == "labels":
        found.append(_scoring(config, teacher, length))
    lesson = _stored_lesson(config, student, length)
    found.append(_training(config, "distill", pupil, distill, *lesson))
    if config.method.name == "soda":
        dpo = AlignObjective(
            PreferenceConfig(beta=config.method.beta),
            distill.reduction,
            config.method.nll_weight,
            1.0,
        )
        found.insert(0, _sampling(config, pupil, "distill"))
        found.append(_preference(config, "prefer", pupil, distill, dpo, length))
    return found


def _stored_lesson(
    config: Config, student: ModelConfig, length: int
) -> tuple[Objective, Callable[[int], Any]]:
    """What the student minimises on what is stored, soft labels or texts alone; its batches."""
    distill, method = config.distill, config.method
    if config.needs != "labels":
        return NllObjective(distill.reduction, distill.nll_weight), _rows_of(distill, length)
    drawn = method.name == "random_labels"
    ids = config.score.top_k
    if method.name == "random_labels":
        ids = min(method.draws, student.vocab_size)
    eq_11 = DistillObjective.of(distill, config.score.temperature, drawn=drawn)
    return eq_11, _labels_of(distill, length, ids)


def _of_the_proxy(config: Config, teacher: AbstractModel, length: int) -> list[Program]:
    """What ``align`` starts, and the answers that the method lets the proxy give."""
    align = config.align
    found = []
    pairs = align.uses_pairs
    if align.alignment != "none":
        nll = NllObjective(align.reduction, align.nll_weight)
        found.append(_training(config, "warmup", teacher, align, nll, _rows_of(align, length)))
    if pairs or config.method.proxy_answers or config.method.reads_scorer_text:
        found.append(_sampling(config, teacher))
    if pairs and align.preference.loss in REFERENCE_LOSSES:
        found.append(_reference(config, teacher, length))
    if align.alignment in ("nll", "nll_preference"):
        if pairs:
            preference = _preference(
                config, "round", teacher, align, AlignObjective.of(align), length
            )
            found.append(preference)
        else:
            found.append(_training(config, "round", teacher, align, nll, _rows_of(align, length)))
    return found


# --- batches --------------------------------------------------------------------------------------


def _rows_of(stage: TrainingSection, length: int) -> Callable[[int], TokenBatch]:
    # Packed rows are planned with as many places as rows of half the length would need.
    packed = stage.batching == "pack"
    segments = packed_segments(np.array([length // 2]), length) if packed else 1
    return lambda rows: abstract_rows(rows, length, segments)


def _pairs(rows: int, length: int, share_prompt: bool) -> Pairs:
    """The longest; in one row where a round's lengths may choose that, which needs more memory."""
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
    """The rows of a pair, and the tokens of each."""
    prompt, answer = np.array([lengths.prompt]), np.array([lengths.answer])
    shared = shares_prompt(preference, model, prompt, answer, answer)
    return (1, lengths.row + lengths.answer) if shared else (2, lengths.row)


def _labels_of(stage: TrainingSection, length: int, top_k: int) -> Callable[[int], DistillBatch]:
    batch_of = _rows_of(stage, length)

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


def step_cost(
    model: AbstractModel, axes: dict[str, int], rows: int, length: int, *, state: Any
) -> Cost:
    """Of a training step on so many rows of so many tokens, whose state has these shapes."""
    spec = model.spec
    full = spec.trainable == "full"
    flops = step_flops(spec.config, rows, length, full=full, remat=spec.remat)
    passes = 3 if spec.remat in ("full", "outputs") else 2
    moved = passes * weights_read(model, axes) + 3 * bytes_per_device(state, axes)
    return Cost(flops, moved)


def _training(
    config: Config,
    name: str,
    model: AbstractModel,
    stage: TrainingSection,
    objective: Objective,
    batch_of: Callable[[int], Any],
    *,
    rows_of: Callable[[Lengths], tuple[int, int]] = lambda lengths: (1, lengths.row),
) -> Program:
    """A training step; ``rows_of`` gives the rows of an example and the tokens of each."""

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        number, length = rows_of(lengths)
        return step_cost(model, axes, number * rows, length, state=model.state)

    return step_program(
        config,
        name,
        "align" if stage is config.align else "distill",
        model.spec,
        objective,
        model.optimizer,
        model.state,
        model.frozen,
        batch_of,
        cost,
    )


def _preference(
    config: Config,
    name: str,
    model: AbstractModel,
    stage: TrainingSection,
    objective: AlignObjective,
    length: int,
) -> Program:
    pair = (objective.preference, model.spec.config)
    return _training(
        config,
        name,
        model,
        stage,
        objective,
        lambda rows: _pairs(rows, length, may_share_prompt(*pair)),
        rows_of=lambda lengths: _rows_of_pair(lengths, *pair),
    )


def _sampling(config: Config, model: AbstractModel, trained_as: Work = "align") -> Program:
    sampling = config.align.sampling

    def resident(mesh: Mesh) -> int:
        """The optimizer's state; and the weights as training has them, if that is elsewhere."""
        axes = dict(mesh.shape)
        trained = config.mesh.of(trained_as).model_dump(include={"fsdp", "tensor"})
        held = bytes_per_device(model.state.opt_state, trained)
        if any(axes[name] != size for name, size in trained.items()):
            held += bytes_per_device((model.frozen, model.state.trainable), trained)
        return held

    vocab_size = model.spec.config.vocab_size
    return answering_program(
        "sample",
        "sample",
        model,
        sampling.batch_size,
        max_length=config.corpus.max_length,
        max_new_tokens=sampling.max_new_tokens,
        settings=DrawSettings(sampling.temperature, sampling.top_p, vocab_size, (0,)),
        resident=resident,
    )


def _reference(config: Config, model: AbstractModel, length: int) -> Program:
    align = config.align
    pair = (align.preference, model.spec.config)

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        weights = (place(tree, mesh) for tree in (model.frozen, model.state.trainable))
        batch = place_rows(_pairs(rows, length, may_share_prompt(*pair)), mesh)
        return [pair_logps.lower(*weights, batch, spec=model.spec, microbatches=1)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        number, length = _rows_of_pair(lengths, *pair)
        flops = forward_flops(model.spec.config, number * rows, length)
        return Cost(flops, weights_read(model, axes))

    def resident(mesh: Mesh) -> int:
        return bytes_per_device(model.state.opt_state, dict(mesh.shape))

    rows = align.batch_size // align.microbatches
    size = model.spec.config.num_params
    return Program("reference", "align", size, rows, lower, model.weight_bytes, resident, cost)


def _scoring(config: Config, model: AbstractModel, length: int) -> Program:
    spec, score = model.spec, config.score

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        params, adapter = (place(tree, mesh) for tree in model.weights)
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
        model.weight_bytes,
        lambda mesh: 0,
        cost,
        lambda rows, lengths: (1.0, rows * lengths.answer / size),
    )
