"""What learns, and how it meets what does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from proxykd_jax.models.config import ModelConfig
from proxykd_jax.parallel.sharding import tree_shardings

Tree = Any
# (params, adapter) of one model, as a forward pass takes them.
Weights = tuple[Tree, Tree | None]


@flax.struct.dataclass
class TrainState:
    """All that a step changes. Frozen weights are arguments of a step, not state.

    Attributes:
      step: int32, steps taken in this stage.
      trainable: the adapter, or all parameters in float32; where several models learn, a dictionary
        of them by role.
      opt_state: the optimizer's.
    """

    step: jax.Array
    trainable: Tree
    opt_state: optax.OptState


@dataclass(frozen=True)
class ModelSpec:
    """The static half of a model under training.

    Attributes:
      config: the architecture, with ``lora`` set if an adapter is trained.
      trainable: ``lora`` (an adapter over frozen weights) or ``full``.
      dtype: precision of the computation; with ``full`` the trained weights stay float32 and are
        cast at each step.
      remat: name of what is recomputed in the backward pass.
    """

    config: ModelConfig
    trainable: Literal["lora", "full"]
    dtype: str
    remat: str

    def bind(self, frozen: Tree, trainable: Tree) -> Weights:
        """The model that this frozen and this trainable part make."""
        if self.trainable == "lora":
            return frozen, trainable
        return jax.tree.map(lambda x: x.astype(self.dtype), trainable), None

    def learner(self, trainable: Tree) -> Tree:
        """All of it: nothing else learns."""
        return trainable

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """Nothing."""
        return {}


class Spec(Hashable, Protocol):
    """The static half of what a step trains: a ``ModelSpec``, or several models together."""

    @property
    def config(self) -> ModelConfig:
        """The architecture of what learns."""
        ...

    def bind(self, frozen: Tree, trainable: Tree) -> Any:
        """The models that an objective reads: ``Weights`` of one, or a dictionary of several."""
        ...

    def learner(self, trainable: Tree) -> Tree:
        """Of all that learns, the part that is the stage's model."""
        ...

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """What a device holds beside the stage's model and its optimizer, by name."""
        ...


def init_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable)
    )


def with_fresh_optimizer(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The same model before its first step by an optimizer."""
    shapes = jax.eval_shape(optimizer.init, state.trainable)
    make = jax.jit(optimizer.init, out_shardings=tree_shardings(shapes, mesh))
    return dataclasses.replace(state, opt_state=make(state.trainable))


def abstract_state(
    trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes and shardings of a training state, to restore into."""
    shapes = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )
