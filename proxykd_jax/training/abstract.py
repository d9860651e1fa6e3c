"""Batches and compiled programs, made from array shapes alone.

Nothing is loaded. Weights, states and batches are abstract arrays; their shardings come from the
sharding table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from proxykd_jax.config import Work
from proxykd_jax.generation.decode import (
    DrawSettings,
    PromptBatch,
    decode,
    decode_specs,
    prefill,
)
from proxykd_jax.generation.sampler import prompt_bucket, slot_bucket
from proxykd_jax.generation.samples import LengthBudget
from proxykd_jax.models.operations import answer_flops, cache_bytes, step_flops
from proxykd_jax.models.params import abstract_params
from proxykd_jax.models.quantized import QuantizedKernel
from proxykd_jax.parallel.sharding import (
    ROWS,
    bytes_per_device,
    fitting,
    row_ways,
    tree_shardings,
)
from proxykd_jax.training.model import Model
from proxykd_jax.training.state import TrainState, init_state
from proxykd_jax.training.steps import make_train_step
from proxykd_jax.types import TokenBatch

if TYPE_CHECKING:
    from proxykd_jax.training.phase import Phase
    from proxykd_jax.training.stage_run import StageRun


@dataclass(frozen=True)
class Lengths:
    """Mean tokens of a prompt and of an answer: the basis of estimated times, but not of memory,
    which is estimated from the longest row."""

    prompt: int
    answer: int

    @property
    def row(self) -> int:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Cost:
    """What one run of a program costs.

    Attributes:
      flops: floating-point operations of all devices together.
      bytes_moved: bytes that a device exchanges with its memory: the weights once a pass, the parts
        of the cache that are read, and the optimizer's state.
    """

    flops: float
    bytes_moved: float


@dataclass(frozen=True)
class Program:
    """The programs of a stage, or of one part of a stage.

    Attributes:
      name: name of the stage or part; ``docs/scale.md`` lists them.
      work: which of the config's meshes it runs on.
      num_params: number of parameters of its model.
      rows: rows that it computes at once, as the config says; 0 if it computes none.
      lower: (mesh, rows) -> the lowered programs; the largest one determines the memory.
      held: mesh's axes -> bytes of weights and state among a device's arguments.
      resident: mesh -> bytes that a device holds in addition to the program's arguments.
      cost: (mesh's axes, rows, lengths) -> cost of this many rows.
      runs: (rows, lengths) -> how often each lowered program runs for this many rows.
      times: rows that it computes for each row of the corpus.
      whole: True if no key of the config reduces its rows.
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
    times: float = 1.0
    whole: bool = False


def state_of(phase: Phase) -> TrainState:
    """Returns the abstract state that a phase of a sketch trains."""
    found: TrainState = jax.eval_shape(
        lambda tree: init_state(tree, phase.optimizer), phase.trainable
    )
    return found


def while_drawing(run: StageRun, axes: dict[str, int]) -> tuple[dict[str, int], bool]:
    """Returns how a stage's own arrays lie while it draws answers on a mesh of ``axes``.

    Returns:
      The sizes of the axes that split these arrays, and whether they differ from ``axes``: then the
      weights that answer are a second copy.
    """
    meshes = run.config.mesh
    if meshes.drawing(run.stage) == run.stage:
        return axes, False
    own = meshes.of(run.stage).model_dump(include={"fsdp", "tensor"})
    return own, any(axes[name] != size for name, size in own.items())


def weight_bytes(model: Model, axes: dict[str, int]) -> int:
    """Returns the bytes of a model's weights on one device in a forward pass."""
    return bytes_per_device(model.weight_shapes, axes)


def abstract_rows(rows: int, length: int, num_segments: int = 1) -> TokenBatch:
    """Returns the shapes of a batch of ``rows`` rows of ``length`` positions."""
    ids, mask = (jax.ShapeDtypeStruct((rows, length), kind) for kind in (jnp.int32, jnp.bool_))
    examples = jax.ShapeDtypeStruct((rows, num_segments), jnp.bool_)
    return TokenBatch(ids, ids, mask, ids, ids, examples)


# --- programs -------------------------------------------------------------------------------------


def step_program(
    run: StageRun,
    phase: Phase,
    name: str,
    batch_of: Callable[[int], Any],
    *,
    cost: Callable[[dict[str, int], int, Lengths], Cost] | None = None,
    rows_of: Callable[[Lengths], tuple[int, int]] = lambda lengths: (1, lengths.row),
    times: float = 1.0,
    resident: Callable[[Mesh], int] = lambda mesh: 0,
) -> Program:
    """Returns the program of a training step.

    Args:
      run: a sketch (see ``training.sketch``).
      phase: the phase that takes the step.
      name, cost, times, resident: see ``Program``; by default the cost is that of the run's model.
      batch_of: rows -> shapes of the step's batch.
      rows_of: lengths -> (rows of an example, tokens of each row), for the default cost.
    """
    section, state, frozen = run.section, state_of(phase), phase.frozen

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        # With several micro-batches a step also holds the summed gradients.
        parts = 1 if rows >= section.batch_size else 2
        step: Any = make_train_step(
            phase.spec, phase.objective, phase.optimizer, microbatches=parts, seed=phase.seed
        )
        batch = place_rows(batch_of(rows * parts), mesh)
        return [step.lower(place(state, mesh), place(frozen, mesh), batch)]

    def own_cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        number, length = rows_of(lengths)
        return step_cost(run.model, axes, number * rows, length, state=state)

    return Program(
        name,
        run.stage,
        phase.spec.config.num_params,
        section.batch_size // section.microbatches,
        lower,
        lambda axes: bytes_per_device((frozen, state), axes),
        resident,
        cost or own_cost,
        times=times,
    )


def step_cost(model: Model, axes: dict[str, int], rows: int, length: int, *, state: Any) -> Cost:
    """Returns the cost of a training step on ``rows`` rows of ``length`` tokens."""
    spec = model.spec
    full = spec.trainable == "full"
    flops = step_flops(spec.config, rows, length, full=full, remat=spec.remat)
    passes = 3 if spec.remat in ("full", "outputs") else 2
    moved = passes * weights_read(model, axes) + 3 * bytes_per_device(state, axes)
    return Cost(flops, moved)


def answering_program(
    name: str,
    work: Work,
    model: Model,
    rows: int,
    *,
    budget: LengthBudget,
    settings: DrawSettings,
    resident: Callable[[Mesh], int],
    other: Model | None = None,
    times: float = 1.0,
) -> Program:
    """Returns the programs that answer a batch of prompts: prefill and the decoding loop.

    Args:
      name, work, rows, resident, times: see ``Program``.
      model: the model that answers.
      budget: limits of rows and answers; a prompt is assumed to fill half of the longest row.
      settings: how tokens are drawn.
      other: the model that ``settings.mixing`` mixes in, if any.
    """
    spec = model.spec
    # A batch's cache is largest for rows of the greatest length.
    longest = budget.max_length // 2
    prompt = prompt_bucket(longest)
    slots = slot_bucket(prompt + budget.after(longest))
    models = [model, *([] if other is None else [other])]

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        params, adapter = (place(tree, mesh) for tree in model.weight_shapes)
        beside = () if other is None else (place(other.weight_shapes, mesh),)
        ids, valid = (jax.ShapeDtypeStruct((rows, prompt), kind) for kind in (jnp.int32, jnp.bool_))
        words = jax.ShapeDtypeStruct((rows, 4), jnp.uint32)
        batch = PromptBatch(ids, valid, words, jax.ShapeDtypeStruct((rows,), jnp.int32))
        scalar = jax.ShapeDtypeStruct((), jnp.uint32)
        arguments = ((params, adapter), place_rows(batch, mesh), scalar, scalar, *beside)
        options: dict[str, Any] = {"config": spec.config, "settings": settings}
        first = prefill.lower(*arguments, slots=slots, **options)
        state = jax.eval_shape(lambda *given: prefill(*given, slots=slots, **options), *arguments)
        state = jax.tree.map(
            lambda x, part: _shaped(x, NamedSharding(mesh, fitting(part, x.shape, mesh))),
            state,
            decode_specs(state),
        )
        few = jax.ShapeDtypeStruct((), jnp.int32)
        return [first, decode.lower((params, adapter), state, few, *beside, **options)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        a_device = rows // row_ways(axes)
        steps = lengths.answer
        flops, moved = 0.0, 0.0
        for found in models:
            config, itemsize = found.spec.config, jnp.dtype(found.spec.dtype).itemsize
            cache = cache_bytes(config, a_device, lengths.row, itemsize) / axes["tensor"]
            flops += answer_flops(config, rows, lengths.prompt, lengths.answer)
            moved += (1 + steps) * weights_read(found, axes) + steps * cache
        return Cost(flops, moved)

    return Program(
        name,
        work,
        spec.config.num_params,
        rows,
        lower,
        lambda axes: sum(weight_bytes(found, axes) for found in models),
        resident,
        cost,
        lambda rows, lengths: (1.0, float(lengths.answer)),
        times,
    )


# --- pieces ---------------------------------------------------------------------------------------


def place(tree: Any, mesh: Mesh) -> Any:
    """Returns the shapes of a tree with the shardings of the table.

    Raises:
      UserError: the size of a mesh axis does not divide an array.
    """
    return jax.tree.map(_shaped, tree, tree_shardings(tree, mesh))


def place_rows(batch: Any, mesh: Mesh) -> Any:
    """Returns the shapes of a batch, sharded as ``put_rows`` would shard it."""
    sharding = NamedSharding(mesh, ROWS)
    return jax.tree.map(lambda x: _shaped(x, sharding), batch)


def _shaped(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def weights_read(model: Model, axes: dict[str, int]) -> float:
    """Returns the bytes of weights that a device moves in one pass.

    Weights split over ``fsdp`` are gathered, weights split over ``tensor`` are not. Quantised
    weights are read, written in the type of the computation, and read again.
    """
    params, _ = model.weight_shapes
    tensor = {"tensor": axes.get("tensor", 1)}
    moved = bytes_per_device(params, tensor)
    if isinstance(params["layers"]["mlp"]["up_proj"]["kernel"], QuantizedKernel):
        plain = abstract_params(model.spec.config, model.spec.dtype)
        moved += 2 * bytes_per_device({"layers": plain["layers"]}, tensor)
    return moved
