"""The programs of a run from shapes alone, as its stages would start them.

Nothing is loaded: weights, states and batches are abstract arrays with the shardings that the
table gives them. ``plan`` compiles these programs, ``--dry-run`` traces one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from proxykd_jax.config import (
    Config,
    ModelSection,
    PreferenceConfig,
    TrainingSection,
    Work,
)
from proxykd_jax.data.order import default_buckets, packed_segments
from proxykd_jax.generation.decode import (
    DrawSettings,
    PromptBatch,
    decode,
    decode_specs,
    prefill,
)
from proxykd_jax.generation.sampler import prompt_bucket, slot_bucket
from proxykd_jax.generation.score_rows import positions_at_once
from proxykd_jax.generation.scoring import hidden_rows, soft_labels_of_hidden
from proxykd_jax.losses import REFERENCE_LOSSES
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.cost import (
    answer_flops,
    cache_bytes,
    forward_flops,
    head_flops,
    layer_flops,
    step_flops,
)
from proxykd_jax.models.lora import abstract_adapter
from proxykd_jax.models.params import abstract_params
from proxykd_jax.models.quantized import QuantizedKernel
from proxykd_jax.parallel.sharding import ROWS, bytes_per_device, fitting, tree_shardings
from proxykd_jax.training.model import quantization
from proxykd_jax.training.objectives import (
    AlignObjective,
    DistillObjective,
    NllObjective,
    Objective,
)
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.training.state import ModelSpec, Tree, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import DistillBatch, PairBatch, TokenBatch


@dataclass(frozen=True)
class Lengths:
    """Tokens of the mean prompt and the mean answer; time is counted at these, memory at the
    longest row."""

    prompt: int
    answer: int

    @property
    def row(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Cost:
    """What a run of a program takes.

    Attributes:
      flops: of all devices together.
      bytes_moved: between a device and its memory: weights once a pass, what is read of the cache,
        the state of the optimizer.
    """

    flops: float
    bytes_moved: float


@dataclass(frozen=True)
class Program:
    """A stage, or the part of one that has programs of its own.

    Attributes:
      name: ``warmup``, ``sample``, ``reference``, ``round``, ``score`` or ``distill``.
      work: which of the config's meshes it runs on.
      num_params: of its model.
      rows: that it computes at once, as the config says.
      lower: (mesh, rows) -> the lowered programs; the largest needs the memory.
      held: mesh's axes -> bytes of weights and state among a device's arguments.
      resident: mesh -> bytes that a device holds beside the program's arguments.
      cost: (mesh's axes, rows, lengths) -> cost of so many rows.
      runs: (rows, lengths) -> how often each of the lowered programs runs for so many rows.
    """

    name: str
    work: Work
    num_params: int
    rows: int
    lower: Callable[[Mesh, int], list[Any]]
    held: Callable[[dict[str, int]], int]
    resident: Callable[[Mesh], int]
    cost: Callable[[dict[str, int], int, Lengths], Cost]
    runs: Callable[[int, Lengths], tuple[float, ...]] = lambda rows, lengths: (1.0,)


@dataclass(frozen=True)
class AbstractModel:
    """A model of the config without its weights.

    Attributes:
      spec: the static half.
      frozen, state: shapes of the weights that do not learn, and of the training state.
      optimizer: that the state belongs to.
    """

    spec: ModelSpec
    frozen: Tree
    state: Any
    optimizer: Any

    @property
    def weights(self) -> tuple[Tree, Tree | None]:
        """Shapes of (params, adapter) in a forward pass."""
        found: tuple[Tree, Tree | None] = jax.eval_shape(
            self.spec.bind, self.frozen, self.state.trainable
        )
        return found

    def weight_bytes(self, axes: dict[str, int]) -> int:
        """What a device holds of them."""
        return bytes_per_device(self.weights, axes)


def abstract_model(
    config: ModelConfig, section: ModelSection, stage: TrainingSection
) -> AbstractModel:
    """The proxy or the student as ``load_for_training`` would load it.

    Args:
      config: its architecture, with ``lora`` set where an adapter is trained.
      section: ``config.proxy`` or ``config.student``.
      stage: the section that trains it.
    """
    full = section.trainable == "full"
    dtype = "float32" if full else section.dtype
    weights = abstract_params(config, dtype, quantization(section))
    frozen, trainable = ({}, weights) if full else (weights, abstract_adapter(config))
    optimizer = make_optimizer(stage.optimizer, 1)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    spec = ModelSpec(config, section.trainable, section.dtype, section.remat)
    return AbstractModel(spec, frozen, state, optimizer)


def abstract_rows(rows: int, length: int, num_segments: int = 1) -> TokenBatch:
    """Shapes of a batch."""
    ids, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, jnp.bool_))
    examples = jax.ShapeDtypeStruct((rows, num_segments), jnp.bool_)
    return TokenBatch(ids, ids, mask, ids, ids, examples)


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
        method, ids = config.method, config.score.top_k
        if method.name == "random_labels":
            ids = min(method.draws, student.vocab_size)
        drawn = method.name == "random_labels"
        eq_11 = DistillObjective.of(distill, config.score.temperature, drawn=drawn)
        labels = _labels_of(distill, length, ids)
        found.append(_training(config, "distill", pupil, distill, eq_11, labels))
    else:
        eq_7 = NllObjective(distill.reduction, distill.nll_weight)
        rows = _rows_of(distill, length)
        found.append(_training(config, "distill", pupil, distill, eq_7, rows))
    if config.method.name == "soda":
        dpo = AlignObjective(
            PreferenceConfig(beta=config.method.beta),
            distill.reduction,
            config.method.nll_weight,
            1.0,
        )
        found.insert(0, _sampling(config, pupil, "distill"))
        pairs = _training(
            config, "prefer", pupil, distill, dpo, lambda rows: _pairs(rows, length), answers=2
        )
        found.append(pairs)
    return found


def _of_the_proxy(config: Config, teacher: AbstractModel, length: int) -> list[Program]:
    """What ``align`` starts, and the answers that the method lets the proxy give."""
    align = config.align
    found = []
    pairs = align.uses_pairs
    if align.alignment != "none":
        nll = NllObjective(align.reduction, align.nll_weight)
        found.append(_training(config, "warmup", teacher, align, nll, _rows_of(align, length)))
    if pairs or config.method.proxy_answers:
        found.append(_sampling(config, teacher))
    if pairs and align.preference.loss in REFERENCE_LOSSES:
        found.append(_reference(config, teacher, length))
    if align.alignment in ("nll", "nll_preference"):
        objective: Objective = AlignObjective.of(align) if pairs else nll
        batch = (lambda rows: _pairs(rows, length)) if pairs else _rows_of(align, length)
        found.append(
            _training(config, "round", teacher, align, objective, batch, answers=2 if pairs else 1)
        )
    return found


# --- batches --------------------------------------------------------------------------------------


def _rows_of(stage: TrainingSection, length: int) -> Callable[[int], TokenBatch]:
    # Packed rows are planned with as many places as rows of half the length would need.
    packed = stage.batching == "pack"
    segments = packed_segments(np.array([length // 2]), length) if packed else 1
    return lambda rows: abstract_rows(rows, length, segments)


def _pairs(rows: int, length: int) -> PairBatch:
    logps = jax.ShapeDtypeStruct((rows,), jnp.float32)
    batch = abstract_rows(rows, length)
    return PairBatch(batch, batch, logps, logps, jax.ShapeDtypeStruct((rows,), jnp.bool_))


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


def _training(
    config: Config,
    name: str,
    model: AbstractModel,
    stage: TrainingSection,
    objective: Objective,
    batch_of: Callable[[int], Any],
    *,
    answers: int = 1,
) -> Program:
    spec = model.spec

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        # With several micro-batches a step also holds the sum of their gradients.
        parts = 1 if rows >= stage.batch_size else 2
        step: Any = make_train_step(
            spec, objective, model.optimizer, microbatches=parts, seed=config.seed
        )
        batch = place_rows(batch_of(rows * parts), mesh)
        return [step.lower(place(model.state, mesh), place(model.frozen, mesh), batch)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        full = spec.trainable == "full"
        flops = step_flops(spec.config, answers * rows, lengths.row, full=full, remat=spec.remat)
        passes = 3 if spec.remat in ("full", "outputs") else 2
        state = bytes_per_device(model.state, axes)
        return Cost(flops, passes * _weights_read(model, axes) + 3 * state)

    return Program(
        name,
        "align" if stage is config.align else "distill",
        spec.config.num_params,
        stage.batch_size // stage.microbatches,
        lower,
        lambda axes: bytes_per_device((model.frozen, model.state), axes),
        lambda mesh: 0,
        cost,
    )


def _sampling(config: Config, model: AbstractModel, trained_as: Work = "align") -> Program:
    spec = model.spec
    longest = config.corpus.max_length
    sampling = config.align.sampling
    # The most that a batch's cache can hold: a row of the greatest length, its prompt half of it.
    prompt = prompt_bucket(longest // 2)
    budget = longest - longest // 2
    if sampling.max_new_tokens is not None:
        budget = min(budget, sampling.max_new_tokens)
    slots = slot_bucket(prompt + budget)
    settings = DrawSettings(sampling.temperature, sampling.top_p, spec.config.vocab_size, (0,))

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        params, adapter = (place(tree, mesh) for tree in model.weights)
        ids, valid = (jax.ShapeDtypeStruct((rows, prompt), kind) for kind in (jnp.int32, jnp.bool_))
        words = jax.ShapeDtypeStruct((rows, 4), jnp.uint32)
        batch = PromptBatch(ids, valid, words, jax.ShapeDtypeStruct((rows,), jnp.int32))
        scalar = jax.ShapeDtypeStruct((), jnp.uint32)
        arguments = (params, adapter, place_rows(batch, mesh), scalar, scalar)
        options: dict[str, Any] = {"config": spec.config, "settings": settings}
        first = prefill.lower(*arguments, slots=slots, **options)
        state = jax.eval_shape(lambda *given: prefill(*given, slots=slots, **options), *arguments)
        state = jax.tree.map(
            lambda x, part: _shaped(x, NamedSharding(mesh, fitting(part, x.shape, mesh))),
            state,
            decode_specs(state),
        )
        few = jax.ShapeDtypeStruct((), jnp.int32)
        return [first, decode.lower(params, adapter, state, few, **options)]

    def resident(mesh: Mesh) -> int:
        """The optimizer's state; and the weights as training has them, if that is elsewhere."""
        axes = dict(mesh.shape)
        trained = config.mesh.of(trained_as).model_dump(include={"fsdp", "tensor"})
        held = bytes_per_device(model.state.opt_state, trained)
        if any(axes[name] != size for name, size in trained.items()):
            held += bytes_per_device((model.frozen, model.state.trainable), trained)
        return held

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        a_device = rows // (axes["data"] * axes["fsdp"])
        itemsize = jnp.dtype(spec.dtype).itemsize
        cache = cache_bytes(spec.config, a_device, lengths.row, itemsize) / axes["tensor"]
        steps = lengths.answer
        return Cost(
            answer_flops(spec.config, rows, lengths.prompt, lengths.answer),
            (1 + steps) * _weights_read(model, axes) + steps * cache,
        )

    return Program(
        "sample",
        "sample",
        spec.config.num_params,
        sampling.batch_size,
        lower,
        model.weight_bytes,
        resident,
        cost,
        lambda rows, lengths: (1.0, float(lengths.answer)),
    )


def _reference(config: Config, model: AbstractModel, length: int) -> Program:
    align = config.align

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        params, adapter = (place(tree, mesh) for tree in model.weights)
        batch = place_rows(_pairs(rows, length), mesh)
        return [pair_logps.lower(params, adapter, batch, spec=model.spec, microbatches=1)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        flops = 2 * forward_flops(model.spec.config, rows, lengths.row)
        return Cost(flops, _weights_read(model, axes))

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
        return Cost(flops, _weights_read(model, axes))

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


# --- pieces ---------------------------------------------------------------------------------------


def place(tree: Any, mesh: Mesh) -> Any:
    """Shapes with the shardings that the table gives them.

    Raises:
      UserError: an axis of the mesh does not divide an array.
    """
    return jax.tree.map(_shaped, tree, tree_shardings(tree, mesh))


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """Shapes of a batch, as ``put_rows`` would place it."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: _shaped(x, sharding), batch)


def _shaped(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _weights_read(model: AbstractModel, axes: dict[str, int]) -> float:
    """Bytes of weights that a device moves in a pass: fsdp gathers them, tensor does not.

    Quantised ones are read, written out in the type of the computation, and read again.
    """
    params, _ = model.weights
    tensor = {"tensor": axes.get("tensor", 1)}
    moved = bytes_per_device(params, tensor)
    if isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], QuantizedKernel):
        plain = abstract_params(model.spec.config, model.spec.dtype)
        moved += 2 * bytes_per_device({"layers": plain["layers"]}, tensor)
    return moved
