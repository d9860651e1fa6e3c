"""Training of a student with a frozen scorer, whose whole distribution the losses read.

Both models compute on the same rows. Their vocabularies are cut to the tokenizer's ids, from which
answers are drawn. The scorer is an argument of a step, never part of its state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from proxykd_jax.data.collate import Rows
from proxykd_jax.losses import token_logps
from proxykd_jax.models.chunked import map_positions
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.training.logprobs import positions_at_once
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.model import Model
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.restore import load_aligned_proxy
from proxykd_jax.training.scoring import SCORER_TEXT, Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import ModelSpec, TrainState, Tree, Weights
from proxykd_jax.types import TokenBatch


@dataclass(frozen=True)
class ScoredSpec:
    """The static half of a student and its scorer.

    Attributes:
      student, scorer: the static half of each.
      vocab_size: number of the tokenizer's ids; distributions are over these.
    """

    student: ModelSpec
    scorer: ModelSpec
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        """The student's architecture."""
        return self.student.config

    def bind(self, frozen: Tree, trainable: Tree) -> dict[str, Weights]:
        """Returns ``student`` and ``scorer`` from the tree of ``frozen_of``."""
        return {
            "student": self.student.bind(frozen["student"], trainable),
            "scorer": frozen["scorer"],
        }

    def learner(self, trainable: Tree) -> Tree:
        """Returns all of ``trainable``: only the student learns."""
        return trainable

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """Returns the scorer, which a device also holds."""
        return {"scorer": frozen["scorer"]}


def load_scorer(run: StageRun) -> tuple[Model, ScoredSpec]:
    """Loads the proxy as ``align`` left it, aligned or not, on the student's mesh."""
    scorer = load_aligned_proxy(run.config, run.mesh)
    return scorer, ScoredSpec(run.model.spec, scorer.spec, run.corpus.vocab_size)


def frozen_of(student: Model, scorer: Model) -> Tree:
    """Returns the frozen argument of a step of a ``ScoredSpec``."""
    return {"student": student.frozen, "scorer": scorer.weights}


def beside_scorer(run: StageRun) -> dict[str, Any]:
    """Returns the fields of a phase whose steps also read the scorer.

    The scorer is loaded when this phase begins, so that a warm-up does not hold it.
    """
    if run.scorer is not None:
        spec = ScoredSpec(run.model.spec, run.scorer.spec, run.corpus.vocab_size)
        frozen = {"student": run.model.frozen, "scorer": run.scorer.weight_shapes}
        return {"spec": spec, "frozen": frozen}

    def prepare(phase: Phase, trainer: Trainer) -> Phase:
        scorer, spec = load_scorer(run)
        return phase.with_(spec=spec, frozen=frozen_of(run.model, scorer))

    return {"prepare": prepare}


def scorer_text(run: StageRun) -> dict[str, Rows]:
    """Returns the scorer's answers to the prompts of D_s, drawn once at temperature 1 and stored;
    a sketch has the prompts alone.

    Raises:
      UserError: the scorer answered no prompt.
    """
    if run.scorer is not None:
        return {SCORER_TEXT: run.corpus.split("distill")}
    return Scoring(run.config, run.corpus).answer_distill_prompts()


def both_logits(
    models: dict[str, Weights],
    rows: TokenBatch,
    spec: ScoredSpec,
    function: Callable[..., Any],
    *arrays_BL: Any,
    dropout_key: jax.Array | None = None,
) -> Any:
    """Computes ``function(student_logits_BCV, scorer_logits_BCV, *arrays_BC)`` at all positions.

    Positions are processed in chunks, so the logits of all positions never exist together. The
    scorer has no gradient.

    Args:
      models: from ``spec.bind``.
      rows: rows of one example each.
      spec: the static half of both models.
      function: returns a tree of arrays ``[B, C]``, computed position by position.
      arrays_BL: arrays that are cut into the same chunks.
      dropout_key: turns the student's LoRA dropout on.
    """
    (params, adapter), (scorer_params, scorer_adapter) = models["student"], models["scorer"]
    own_BLD = batch_hidden_states(
        params,
        adapter,
        rows,
        config=spec.student.config,
        remat=spec.student.remat,
        dropout_key=dropout_key,
    )
    other_BLD = jax.lax.stop_gradient(
        batch_hidden_states(scorer_params, scorer_adapter, rows, config=spec.scorer.config)
    )

    def head(own: jax.Array, other: jax.Array, *arrays: jax.Array) -> Any:
        student_logits = unembed(params, own, config=spec.student.config)
        scorer_logits = unembed(scorer_params, other, config=spec.scorer.config)
        most = spec.vocab_size
        return function(
            student_logits[..., :most], jax.lax.stop_gradient(scorer_logits[..., :most]), *arrays
        )

    chunk = positions_at_once(own_BLD, spec.vocab_size, models=2)
    length = rows.tokens_BL.shape[1]
    return map_positions(head, own_BLD, other_BLD, *arrays_BL, chunk=min(chunk, length))


@functools.partial(jax.jit, static_argnames="spec")
def sampling_time_logps(
    trainable: Tree, frozen: Tree, rows: TokenBatch, *, spec: ScoredSpec
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probs of the rows' labels under student and scorer, float32 ``[B, L]`` each.

    They are computed by the training step's forward pass, without dropout. Values outside
    ``mask_BL`` are meaningless.
    """

    def logps(student: jax.Array, scorer: jax.Array, labels: jax.Array) -> tuple[jax.Array, ...]:
        return token_logps(student, labels), token_logps(scorer, labels)

    return both_logits(spec.bind(frozen, trainable), rows, spec, logps, rows.labels_BL)
