"""The training state, and how trained and frozen weights form a model."""

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
# (params, adapter) of one model, the arguments of a forward pass.
Weights = tuple[Tree, Tree | None]


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes. Frozen weights are arguments of a step, not state.

    Attributes:
      step: int32, steps taken in this stage.
      trainable: the adapter, or all parameters in float32; a dictionary of these by role if several
        models learn.
      opt_state: the optimizer's state.
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
      remat: which activations are recomputed in the backward pass.
    """

    config: ModelConfig
    trainable: Literal["lora", "full"]
    dtype: str
    remat: str

    def bind(self, frozen: Tree, trainable: Tree) -> Weights:
        """Returns the model that a frozen and a trainable part form."""
        if self.trainable == "lora":
            return frozen, trainable
        return jax.tree.map(lambda x: x.astype(self.dtype), trainable), None

    def learner(self, trainable: Tree) -> Tree:
        """Returns all of ``trainable``, because nothing else learns."""
        return trainable

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """Returns nothing: a device holds no further model."""
        return {}


class Spec(Hashable, Protocol):
    """The static half of what a step trains: a ``ModelSpec``, or several models together."""

    @property
    def config(self) -> ModelConfig:
        """The architecture of what learns."""
        ...

    def bind(self, frozen: Tree, trainable: Tree) -> Any:
        """Returns the models that an objective reads: ``Weights``, or a dictionary of several."""
        ...

    def learner(self, trainable: Tree) -> Tree:
        """Returns the part of all that learns that is the stage's model."""
        ...

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """Returns what a device holds besides the stage's model and its optimizer, by name."""
        ...


def init_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state at step 0."""
    return TrainState(
        step=jnp.zeros((), jnp.int32), trainable=trainable, opt_state=optimizer.init(trainable)
    )


def with_fresh_optimizer(
    state: TrainState, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the same model with the initial state of another optimizer."""
    shapes = jax.eval_shape(optimizer.init, state.trainable)
    make = jax.jit(optimizer.init, out_shardings=tree_shardings(shapes, mesh))
    return dataclasses.replace(state, opt_state=make(state.trainable))


def abstract_state(
    trainable: Any, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Returns the shapes and shardings of a training state, as a target to restore into."""
    shapes = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )
