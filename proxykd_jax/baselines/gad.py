"""GAD (arXiv 2511.10643): the student's reward comes from a discriminator between its answers and
the teacher's, which is trained at the same time. Only the teacher's texts are needed; no proxy.

1. The warm-up trains the student by NLL on the teacher's answers. It also trains the discriminator
   to tell these from answers of the current student.
2. At each step the student gives N answers per prompt, and the discriminator scores them before
   its update. Their advantages within the prompt's group train the student, with a KL to the
   warmed-up student. The pairs (teacher's answer, student's answer) train the discriminator, which
   is never frozen.

Student and discriminator share no parameter, and the advantages come from the discriminator before
its update. Both updates are therefore one step on the sum of their losses.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from proxykd_jax.baselines.gad_discriminator import (
    abstract_discriminator,
    adversarial_optimizer,
    init_discriminator,
    scores,
)
from proxykd_jax.baselines.online import prompt_plan, warmup_rate
from proxykd_jax.baselines.rollouts import (
    Answer,
    AnswerBatch,
    Answering,
    answer_batch,
    answer_figures,
    given_answers,
    read_places,
)
from proxykd_jax.baselines.sampling_programs import answer_program, answer_shapes
from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.online_methods import Gad
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.order import default_buckets
from proxykd_jax.losses import (
    Term,
    batch_count,
    batch_terms,
    discriminator_loss,
    group_advantages,
    low_variance_kl_tokens,
    mixed_objective,
    policy_gradient_tokens,
    reduce_examples,
    token_logps,
)
from proxykd_jax.models.chunked import map_positions
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.models.decoder import batch_hidden_states, unembed
from proxykd_jax.models.operations import forward_flops, head_flops
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.abstract import (
    Cost,
    Lengths,
    Program,
    state_of,
    step_cost,
    step_program,
    weights_read,
)
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective, nll_term
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    count_steps,
    planned_steps,
)
from proxykd_jax.training.distillation import planned_figures, teacher_rows
from proxykd_jax.training.logprobs import positions_at_once
from proxykd_jax.training.phase import MakeBatch, Phase
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import ModelSpec, TrainState, Tree, Weights
from proxykd_jax.types import TokenBatch


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: this method needs no soft labels."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Returns the warm-up of both models, then the adversarial training."""
    config, method = run.config, run.config.method
    assert isinstance(method, Gad)
    distill, rows = config.distill, Joined(teacher_rows(config, run.corpus))
    many = method.samples_per_prompt
    make = init_discriminator if run.scorer is None else abstract_discriminator
    learns = {
        "student": run.model.trainable,
        "discriminator": make(run.model, run.mesh),
    }

    def phase(
        name: str,
        objective: Objective,
        rate: OptimizerConfig,
        planned: tuple[Plan, int],
        **fields: Any,
    ) -> Phase:
        """Returns a phase over these rows; each phase draws its answers by other random keys."""
        plan, steps = planned
        own_rate = method.discriminator_learning_rate or distill.optimizer.learning_rate
        return run.phase(
            name,
            objective,
            adversarial_optimizer(rate, max(steps, 1), discriminator_learning_rate=own_rate),
            rows,
            plan,
            steps,
            spec=GadSpec(run.model.spec, run.corpus.vocab_size),
            **{"frozen": _frozen(run, None), "trainable": learns, **fields},
        )

    plan, steps = prompt_plan(run, method, rows)
    warmup = _warmup_plan(run, method, rows)
    return [
        phase(
            "warmup",
            GadWarmupObjective(distill.reduction),
            warmup_rate(distill.optimizer, method),
            warmup,
            make_batch=_make_batch(run, method, rows, warmup[0], first_draw=0),
            keep=warmup[1] > 0,
            programs=functools.partial(_programs, run, method, "nll", 1),
        ),
        phase(
            "train",
            GadObjective(
                method.kl_weight, method.advantage_ddof, method.temperature, distill.reduction
            ),
            distill.optimizer,
            (plan, steps),
            make_batch=_make_batch(run, method, rows, plan, first_draw=1 << 30),
            # The KL of this phase is to the student at the end of the warm-up.
            prepare=lambda phase, trainer: phase.with_(
                frozen=_frozen(
                    run,
                    trainer.trained_by("warmup", "student", trainer.state.trainable["student"]),
                )
            ),
            before=lambda state: planned_figures(rows, steps),
            # In a sketch the untrained student takes the place of the warmed-up one.
            frozen=_frozen(run, None if run.scorer is None else run.model.trainable),
            programs=functools.partial(_programs, run, method, "distill", many),
        ),
    ]


def _programs(run: StageRun, method: Gad, name: str, own_rows: int, phase: Phase) -> list[Program]:
    """Returns the student's answers, and a step that trains it on ``own_rows`` rows per prompt."""
    if phase.steps == 0:
        return []
    student, many, state = run.model, method.samples_per_prompt, state_of(phase)
    length = default_buckets(run.config.corpus.max_length + 1)[-1]  # the last token is an input
    reference = phase.frozen["reference"]

    def batch(rows: int) -> GameBatch:
        def grouped(x: Any) -> Any:
            return jax.ShapeDtypeStruct((rows, many, *x.shape[1:]), x.dtype)

        samples = jax.tree.map(grouped, answer_shapes(rows * many, length))
        last_P = jax.ShapeDtypeStruct((rows,), jnp.int32)
        last_PG = jax.ShapeDtypeStruct((rows, many), jnp.int32)
        return GameBatch(answer_shapes(rows, length), last_P, samples, last_PG)

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        model = student.spec.config
        own = step_cost(student, axes, own_rows * rows, lengths.row, state=state)
        seen = step_cost(student, axes, (1 + many) * rows, lengths.row, state={})
        passes = 3 if student.spec.trainable == "full" else 2
        no_head = passes * head_flops(model, (1 + many) * rows * lengths.row)
        flops = own.flops + seen.flops - no_head
        moved = own.bytes_moved + seen.bytes_moved
        if reference is not None:
            flops += forward_flops(model, own_rows * rows, lengths.row)
            moved += weights_read(student, axes)
        return Cost(flops, moved)

    answers = answer_program(
        run,
        method,
        phase,
        temperature=method.temperature,
        times=many,
        # The KL's reference and the discriminator, whose optimizer is in the state.
        beside=(student.trainable, state.trainable["discriminator"]),
    )
    return [answers, step_program(run, phase, name, batch, cost=cost)]


def _warmup_plan(run: StageRun, method: Gad, rows: Joined) -> tuple[Plan, int]:
    options: dict[str, Any] = {"epochs": method.warmup_epochs, "most": method.warmup_max_steps}
    plan = run.plan(rows.prompt_lengths - 1, "distill/warmup", packs=False, **options)
    return plan, count_steps(plan, **options) if method.warms_up else 0


def _frozen(run: StageRun, reference: Tree | None) -> Tree:
    return {"base": run.model.frozen, "reference": reference}


@dataclass(frozen=True)
class GadSpec:
    """The static half of student, reference and discriminator, which share an architecture.

    Attributes:
      student: the static half of all three models.
      vocab_size: number of the tokenizer's ids, from which answers are drawn.
    """

    student: ModelSpec
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        """The student's architecture."""
        return self.student.config

    def bind(self, frozen: Tree, trainable: Tree) -> dict[str, Any]:
        """Returns ``base``, ``Weights`` of ``student`` and ``reference``, and ``discriminator``."""
        base, reference = frozen["base"], frozen["reference"]
        return {
            "base": base,
            "student": self.student.bind(base, trainable["student"]),
            "reference": None if reference is None else self.student.bind(base, reference),
            "discriminator": trainable["discriminator"],
        }

    def learner(self, trainable: Tree) -> Tree:
        """Returns the student's part."""
        return trainable["student"]

    def beside(self, frozen: Tree, state: TrainState) -> dict[str, Tree]:
        """Returns the discriminator, and the warmed-up student that the KL refers to."""
        own = state.opt_state.inner_states["discriminator"]
        return {
            "discriminator and its optimizer": (state.trainable["discriminator"], own),
            "warmed-up student": frozen["reference"],
        }


# --- batches --------------------------------------------------------------------------------------


@flax.struct.dataclass
class GameBatch:
    """P prompts, each with one answer of the teacher and G answers of the student.

    The inputs include the last token of each answer, where the discriminator reads its score. That
    position has no label.

    Attributes:
      teacher: P rows.
      teacher_last_P: int32, position of the answer's last token.
      samples: leaves [P, G, ...].
      sample_last_PG: int32, position of the answer's last token.
    """

    teacher: AnswerBatch
    teacher_last_P: Any
    samples: AnswerBatch
    sample_last_PG: Any


def _make_batch(
    run: StageRun, method: Gad, rows: Rows, plan: Plan, *, first_draw: int
) -> MakeBatch:
    """Returns a function that pairs the teacher's rows with answers of the current student.

    Args:
      run, method, rows, plan: see ``phases``.
      first_draw: draw number of the first step's answers; it differs between the phases.
    """
    planned = planned_steps(plan)
    answering = Answering.of(run, method, method.temperature, method.samples_per_prompt)

    def make_batch(state: TrainState, frozen: Tree, step: int) -> GameBatch:
        student = run.model.at(state.trainable["student"])
        places = read_places(rows, planned(step))
        answers = answering.answer(student, places, step + first_draw)
        teacher = given_answers(places, run.corpus.end_token_ids)
        return put_rows(game_batch(teacher, answers, run.corpus.max_length), run.mesh)

    return make_batch


def game_batch(
    teacher: list[Answer | None], samples: list[Answer | None], max_length: int
) -> GameBatch:
    """Returns P answers of the teacher and P x G of the student as NumPy arrays; the rows of each
    are as long as needed."""
    num, group = len(teacher), len(samples) // len(teacher)
    first, first_last_P = _with_last_tokens(teacher, max_length)
    rest, rest_last_B = _with_last_tokens(samples, max_length)
    rest = jax.tree.map(lambda x: x.reshape(num, group, *x.shape[1:]), rest)
    return GameBatch(first, first_last_P, rest, rest_last_B.reshape(num, group))


def _with_last_tokens(
    answers: list[Answer | None], max_length: int
) -> tuple[AnswerBatch, np.ndarray]:
    """Returns a batch whose inputs include each row's last token, and its position."""
    batch = answer_batch(answers, max_length, extra=1)
    last_B = np.zeros(len(answers), np.int32)
    for b, answer in enumerate(answers):
        if answer is not None:
            last_B[b] = len(answer.row.tokens) - 1
            batch.rows.tokens_BL[b, last_B[b]] = answer.row.tokens[-1]
    return batch, last_B


# --- losses ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GadWarmupObjective:
    """The student's NLL of the teacher's answers, plus the discriminator's loss.

    Attributes:
      reduction: reduction of the NLL.
    """

    reduction: str

    def counts(self, batch: GameBatch) -> Counts:
        nll = batch_count(batch.teacher.rows.mask_BL, reduction=self.reduction)
        return {"nll": nll, "discriminator": _pairs(batch).sum(dtype=jnp.float32)}

    def share(
        self,
        models: dict[str, Any],
        batch: GameBatch,
        counts: Counts,
        spec: GadSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.teacher.rows
        discriminator, _, figures = _judge(models, batch, spec)
        logps_BL = _label_logps(models["student"], rows, spec, temperature=1.0)
        terms = {
            "nll": nll_term(logps_BL, rows, rows.mask_BL, self.reduction),
            "discriminator": discriminator,
        }
        loss, metrics = mixed_objective(terms, dict.fromkeys(terms, 1.0), counts=counts)
        return loss, {**metrics, **figures, **answer_figures(_flat(batch.samples))}

    def terms(self) -> dict[str, Objective]:
        return {}


@dataclass(frozen=True)
class GadObjective:
    """The student's policy gradient and KL, plus the discriminator's loss.

    A batch is trained on once, so the probability ratio to the student that drew it is 1. The
    authors' clipping (0.2) would have no effect and is left out.

    Attributes:
      kl_weight: weight of the KL to the warmed-up student.
      ddof: ddof of the standard deviation within a group.
      temperature: temperature of the student, in sampling and in training, and of the reference.
      reduction: reduction of the student's losses.
    """

    kl_weight: float
    ddof: int
    temperature: float
    reduction: str

    def counts(self, batch: GameBatch) -> Counts:
        answers = _flat(batch.samples).rows
        tokens = batch_count(answers.mask_BL, reduction=self.reduction)
        pairs = _pairs(batch).sum(dtype=jnp.float32)
        return {"policy_gradient": tokens, "kl": tokens, "discriminator": pairs}

    def share(
        self,
        models: dict[str, Any],
        batch: GameBatch,
        counts: Counts,
        spec: GadSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        answers = _flat(batch.samples)
        rows = answers.rows
        discriminator, score_PG, figures = _judge(models, batch, spec)
        advantage_PG = group_advantages(score_PG, _pairs(batch), ddof=self.ddof)
        logps_BL = _label_logps(models["student"], rows, spec, temperature=self.temperature)
        reference_BL = _label_logps(models["reference"], rows, spec, temperature=self.temperature)
        gradient_BL = policy_gradient_tokens(
            logps_BL, jax.lax.stop_gradient(logps_BL), advantage_PG.reshape(-1), rows.mask_BL
        )
        kl_BL = low_variance_kl_tokens(logps_BL, reference_BL, rows.mask_BL)
        terms = {
            "policy_gradient": batch_terms(gradient_BL, rows.mask_BL, reduction=self.reduction),
            "kl": batch_terms(kl_BL, rows.mask_BL, reduction=self.reduction),
            "discriminator": discriminator,
        }
        weights = {"policy_gradient": 1.0, "kl": self.kl_weight, "discriminator": 1.0}
        loss, metrics = mixed_objective(terms, weights, counts=counts)
        return loss, {**metrics, **figures, **answer_figures(answers)}

    def terms(self) -> dict[str, Objective]:
        return {}


def _judge(
    models: dict[str, Any], batch: GameBatch, spec: GadSpec
) -> tuple[Term, jax.Array, Metrics]:
    """Returns the discriminator's loss over all pairs, its scores of the samples, and figures."""

    def score(rows: TokenBatch, last_B: jax.Array) -> jax.Array:
        return scores(models["base"], models["discriminator"], rows, last_B, spec.student)

    teacher_P = score(batch.teacher.rows, batch.teacher_last_P)
    last_PG = batch.sample_last_PG
    sample_PG = score(_flat(batch.samples).rows, last_PG.reshape(-1)).reshape(last_PG.shape)
    pairs_PG = _pairs(batch)
    loss = reduce_examples(discriminator_loss(teacher_P, sample_PG, pairs_PG), pairs_PG)
    gap_PG = jax.lax.stop_gradient(teacher_P[:, None] - sample_PG)
    figures = {
        "score_gap": reduce_examples(gap_PG, pairs_PG),
        "discriminator_accuracy": reduce_examples(gap_PG > 0, pairs_PG),
    }
    return loss, jax.lax.stop_gradient(sample_PG), figures


def _pairs(batch: GameBatch) -> jax.Array:
    """Returns bool ``[P, G]``: True for pairs whose answers both have a token."""
    teacher_P = batch.teacher.rows.mask_BL.any(axis=-1)
    return batch.samples.rows.mask_BL.any(axis=-1) & teacher_P[:, None]


def _flat(samples: AnswerBatch) -> AnswerBatch:
    """Reshapes [P, G, ...] to [P x G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)


def _label_logps(
    weights: Weights, rows: TokenBatch, spec: GadSpec, *, temperature: float
) -> jax.Array:
    """Returns float32 log-probs ``[B, L]`` of the labels under the softmax at a temperature."""
    params, adapter = weights
    config = spec.config
    hidden_BLD = batch_hidden_states(params, adapter, rows, config=config, remat=spec.student.remat)

    def head(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        logits = unembed(params, hidden, config=config)[..., : spec.vocab_size]
        return token_logps(logits / temperature, labels)

    chunk = positions_at_once(hidden_BLD, spec.vocab_size)
    length = rows.tokens_BL.shape[1]
    return map_positions(head, hidden_BLD, rows.labels_BL, chunk=min(chunk, length))
