"""GAD's discriminator (arXiv 2511.10643): the initial student with a scalar head instead of its
vocabulary, read at the last token of an answer. One training state holds it and the student.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from proxykd_jax.config import OptimizerConfig
from proxykd_jax.models.decoder import batch_hidden_states
from proxykd_jax.parallel.sharding import tree_shardings
from proxykd_jax.training.model import Model
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.state import ModelSpec, Tree
from proxykd_jax.types import TokenBatch


def init_discriminator(student: Model, mesh: Mesh) -> Tree:
    """Returns ``discriminator_of`` a student, on its mesh."""

    def make(trainable: Tree) -> Tree:
        return discriminator_of(trainable, student.config.model_dim)

    shardings = tree_shardings(jax.eval_shape(make, student.trainable), mesh)
    return jax.jit(make, out_shardings=shardings)(student.trainable)


def abstract_discriminator(student: Model, mesh: Mesh) -> Tree:
    """Returns the shapes of ``init_discriminator``."""
    return jax.eval_shape(
        lambda tree: discriminator_of(tree, student.config.model_dim), student.trainable
    )


def discriminator_of(trainable: Tree, model_dim: int) -> Tree:
    """Returns the discriminator's trainable part: ``body``, a copy of the student's, and
    ``score_head``, which starts at 0 so that all scores are equal and the first loss is ln 2.
    """
    body = {name: tree for name, tree in trainable.items() if name != "lm_head"}
    kernel_D = jnp.zeros(model_dim, jnp.float32)
    return {"body": jax.tree.map(jnp.copy, body), "score_head": {"kernel": kernel_D}}


def scores(
    frozen: Tree, discriminator: Tree, rows: TokenBatch, last_B: jax.Array, spec: ModelSpec
) -> jax.Array:
    """Returns float32 ``scores_B``: the head applied to one hidden state of each row.

    Args:
      frozen: the student's frozen weights.
      discriminator: the discriminator's trainable part.
      rows: rows of one example each; the inputs include its last token.
      last_B: int32, position of that token.
      spec: the student's static half.
    """
    params, adapter = spec.bind(frozen, discriminator["body"])
    hidden_BLD = batch_hidden_states(params, adapter, rows, config=spec.config, remat=spec.remat)
    places_BL = jnp.arange(hidden_BLD.shape[1])[None, :] == last_B[:, None]
    hidden_BD = jnp.where(places_BL[:, :, None], hidden_BLD.astype(jnp.float32), 0.0).sum(axis=1)
    return hidden_BD @ discriminator["score_head"]["kernel"]


def adversarial_optimizer(
    student: OptimizerConfig, steps: int, *, discriminator_learning_rate: float | None
) -> optax.GradientTransformation:
    """Returns one optimizer per model, so that gradients are clipped separately.

    Args:
      student: settings for the student, and for the discriminator except for the learning rate.
      steps: as in ``make_optimizer``.
      discriminator_learning_rate: None for the student's.
    """
    changed: dict[str, Any] = {}
    if discriminator_learning_rate is not None:
        changed["learning_rate"] = discriminator_learning_rate
    optimizers = {
        "student": make_optimizer(student, steps),
        "discriminator": make_optimizer(student.model_copy(update=changed), steps),
    }
    return optax.multi_transform(optimizers, {name: name for name in optimizers})
