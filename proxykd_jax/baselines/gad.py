"""GAD (arXiv 2511.10643): the student's reward is a discriminator between its answers and the
teacher's, which learns with it. Texts of the teacher are all that is needed; no proxy.

1. Warm-up: the student's NLL on the teacher's answers, and the discriminator's loss on these beside
   answers of the student as it is, together.
2. Each step the student gives N answers a prompt. The discriminator, before its update, scores
   them; their advantages within the group of a prompt train the student, with a KL to the
   warmed-up student, and the discriminator is trained on the pairs (teacher's, student's). It
   never freezes.

Student and discriminator have no parameter in common, and the advantages are the old
discriminator's, so both updates are one step on the sum of their losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from proxykd_jax.baselines.online import end_warmup, prompt_plan, warmup_rate
from proxykd_jax.baselines.rollouts import (
    Answer,
    AnswerBatch,
    Answering,
    answer_batch,
    answer_figures,
    given_answers,
    read_places,
)
from proxykd_jax.config import OptimizerConfig
from proxykd_jax.config.online_methods import Gad
from proxykd_jax.data.collate import Rows
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
from proxykd_jax.parallel.sharding import put_rows
from proxykd_jax.training.batches import (
    Joined,
    Plan,
    count_steps,
    planned_steps,
)
from proxykd_jax.training.discriminator import (
    adversarial_optimizer,
    init_discriminator,
    scores,
)
from proxykd_jax.training.distillation import Course, teacher_rows
from proxykd_jax.training.logprobs import positions_at_once
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.objectives import Counts, Metrics, Objective, nll_term
from proxykd_jax.training.scoring import Scoring
from proxykd_jax.training.state import ModelSpec, Tree, abstract_state
from proxykd_jax.training.student import StudentRun
from proxykd_jax.types import TokenBatch


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Nothing is scored."""
    return {}


def train(run: StudentRun) -> None:
    """Warm-up of both, then the game."""
    config, method = run.config, run.config.method
    assert isinstance(method, Gad)
    rows = Joined(teacher_rows(config, run.corpus))
    plan, steps = prompt_plan(run, method, rows)
    optimizer = _optimizer(run, method, config.distill.optimizer, steps)
    beside = {"discriminator": init_discriminator(run.student, run.mesh)}
    trainer = run.open_trainer(optimizer, beside)
    run.look_at_untrained(trainer, {"rows": len(rows), "planned_steps": steps})
    if trainer.progress.phase == 1:
        _warm_up(run, method, trainer, rows, optimizer)
    if trainer.progress.phase == 2:
        trainer.frozen = _frozen(run, _warmed_up_student(run, trainer, optimizer))
        objective = GadObjective(
            method.kl_weight,
            method.advantage_ddof,
            method.temperature,
            config.distill.reduction,
        )
        batches = _batches(run, method, trainer, rows, plan, steps)
        _course(run, objective, optimizer, batches).take(trainer, "train", steps)
        trainer.finish_phase("train", {}, keep=False)
    trainer.finish(run.folder, {"rows": len(rows)})


def _warm_up(
    run: StudentRun,
    method: Gad,
    trainer: Trainer,
    rows: Joined,
    optimizer: optax.GradientTransformation,
) -> None:
    """Phase 1; its checkpoint holds the student that the game's KL is to."""
    if method.warms_up:
        plan = run.plan(rows.prompt_lengths - 1, "distill/warmup", packs=False)
        steps = count_steps(plan, method.warmup_epochs, method.warmup_max_steps)
        trainer.frozen = _frozen(run, None)
        objective = GadWarmupObjective(run.config.distill.reduction)
        rate = warmup_rate(run.config.distill.optimizer, method)
        batches = _batches(run, method, trainer, rows, plan, steps)
        course = _course(run, objective, _optimizer(run, method, rate, steps), batches)
        course.take(trainer, "warmup", steps)
    end_warmup(run, trainer, optimizer)


def _warmed_up_student(
    run: StudentRun, trainer: Trainer, optimizer: optax.GradientTransformation
) -> Tree:
    """What the student had learnt when the game began, from the checkpoint of that moment."""
    step = next(found["step"] for found in trainer.progress.results if found["phase"] == "warmup")
    target = abstract_state(trainer.state.trainable, optimizer, run.mesh)
    return trainer.checkpoints.restore(step, target)[0].trainable["student"]


def _optimizer(
    run: StudentRun, method: Gad, config: OptimizerConfig, steps: int
) -> optax.GradientTransformation:
    """``config`` is the student's; the discriminator's rate is its own in both phases."""
    own_rate = method.discriminator_learning_rate or run.config.distill.optimizer.learning_rate
    return adversarial_optimizer(config, max(steps, 1), discriminator_learning_rate=own_rate)


def _course(
    run: StudentRun,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batches: Iterator[GameBatch],
) -> Course:
    spec = GadSpec(run.student.spec, run.corpus.vocab_size)
    return Course.of(run.config, spec, objective, optimizer, batches, from_state=True)


def _frozen(run: StudentRun, reference: Tree | None) -> Tree:
    return {"base": run.student.frozen, "reference": reference}


@dataclass(frozen=True)
class GadSpec:
    """The static half of student, reference and discriminator, which share an architecture.

    Attributes:
      student: of all three.
      vocab_size: ids of the tokenizer, which answers are drawn from.
    """

    student: ModelSpec
    vocab_size: int

    @property
    def config(self) -> ModelConfig:
        """The student's architecture."""
        return self.student.config

    def bind(self, frozen: Tree, trainable: Tree) -> tuple[Tree, None]:
        """``base``; (params, adapter) of ``student`` and ``reference``; ``discriminator``."""
        base, reference = frozen["base"], frozen["reference"]
        return {
            "base": base,
            "student": self.student.bind(base, trainable["student"]),
            "reference": None if reference is None else self.student.bind(base, reference),
            "discriminator": trainable["discriminator"],
        }, None


# --- batches --------------------------------------------------------------------------------------


@flax.struct.dataclass
class GameBatch:
    """P prompts with the teacher's answer and G of the student's.

    The last token of each answer is among the inputs, where the discriminator reads it; there is
    no label there.

    Attributes:
      teacher: P rows.
      teacher_last_P: int32, the position of the answer's last token.
      samples: leaves [P, G, ...].
      sample_last_PG: int32.
    """

    teacher: AnswerBatch
    teacher_last_P: Any
    samples: AnswerBatch
    sample_last_PG: Any


def _batches(
    run: StudentRun, method: Gad, trainer: Trainer, rows: Rows, plan: Plan, steps: int
) -> Iterator[GameBatch]:
    """The teacher's rows, and the answers of the student as it is when a batch is asked for."""
    answering = Answering.of(run, method, method.temperature, method.samples_per_prompt)
    # The two phases draw by keys of their own.
    offset = 0 if trainer.progress.phase == 1 else 1 << 30
    start = trainer.progress.phase_step
    for step, planned in planned_steps(plan, start=start, stop=steps):
        student, places = (
            run.student.at(trainer.state.trainable["student"]),
            read_places(rows, planned),
        )
        answers = answering.answer(student.weights, places, step + offset)
        teacher = given_answers(places, run.corpus.end_token_ids)
        yield put_rows(game_batch(teacher, answers, run.corpus.max_length), run.mesh)


def game_batch(
    teacher: list[Answer | None], samples: list[Answer | None], max_length: int
) -> GameBatch:
    """P answers of the teacher and P x G of the student, in NumPy; rows of each as long as it
    needs."""
    num, group = len(teacher), len(samples) // len(teacher)
    first, first_last_P = _with_last_tokens(teacher, max_length)
    rest, rest_last_B = _with_last_tokens(samples, max_length)
    rest = jax.tree.map(lambda x: x.reshape(num, group, *x.shape[1:]), rest)
    return GameBatch(first, first_last_P, rest, rest_last_B.reshape(num, group))


def _with_last_tokens(
    answers: list[Answer | None], max_length: int
) -> tuple[AnswerBatch, np.ndarray]:
    """A batch whose inputs hold each row's last token too, and where."""
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
    """The student's NLL of the teacher's answers, and the discriminator's loss.

    Attributes:
      reduction: of the NLL.
    """

    reduction: str

    def counts(self, batch: GameBatch) -> Counts:
        nll = batch_count(batch.teacher.rows.mask_BL, reduction=self.reduction)
        return {"nll": nll, "discriminator": _pairs(batch).sum(dtype=jnp.float32)}

    def share(
        self,
        params: Tree,
        adapter: Tree | None,
        batch: GameBatch,
        counts: Counts,
        spec: GadSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.teacher.rows
        discriminator, _, figures = _judge(params, batch, spec)
        logps_BL = _label_logps(params["student"], rows, spec, temperature=1.0)
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
    """The student's policy gradient and KL, and the discriminator's loss.

    A batch is trained on once, so the ratio to the student that drew it is 1: the clipping of its
    authors (0.2) has nothing to clip.

    Attributes:
      kl_weight: of the KL to the warmed-up student.
      ddof: of the standard deviation within a group.
      temperature: of the student that is trained, and of the reference: the one that answers.
      reduction: of the student's losses.
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
        params: Tree,
        adapter: Tree | None,
        batch: GameBatch,
        counts: Counts,
        spec: GadSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        answers = _flat(batch.samples)
        rows = answers.rows
        discriminator, score_PG, figures = _judge(params, batch, spec)
        advantage_PG = group_advantages(score_PG, _pairs(batch), ddof=self.ddof)
        logps_BL = _label_logps(params["student"], rows, spec, temperature=self.temperature)
        reference_BL = _label_logps(params["reference"], rows, spec, temperature=self.temperature)
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


def _judge(params: Tree, batch: GameBatch, spec: GadSpec) -> tuple[Term, jax.Array, Metrics]:
    """The discriminator's loss over all pairs, its scores of the samples, and figures."""

    def score(rows: TokenBatch, last_B: jax.Array) -> jax.Array:
        return scores(params["base"], params["discriminator"], rows, last_B, spec.student)

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
    """bool ``[P, G]``: pairs of which both answers have a token."""
    teacher_P = batch.teacher.rows.mask_BL.any(axis=-1)
    return batch.samples.rows.mask_BL.any(axis=-1) & teacher_P[:, None]


def _flat(samples: AnswerBatch) -> AnswerBatch:
    """[P, G, ...] to [P x G, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)


def _label_logps(
    weights: tuple[Tree, Tree | None], rows: TokenBatch, spec: GadSpec, *, temperature: float
) -> jax.Array:
    """float32 log-probs ``[B, L]`` of the labels under the softmax at a temperature."""
    params, adapter = weights
    config = spec.config
    hidden_BLD = batch_hidden_states(params, adapter, rows, config=config, remat=spec.student.remat)

    def head(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        logits = unembed(params, hidden, config=config)[..., : spec.vocab_size]
        return token_logps(logits / temperature, labels)

    chunk = positions_at_once(hidden_BLD, spec.vocab_size)
    length = rows.tokens_BL.shape[1]
    return map_positions(head, hidden_BLD, rows.labels_BL, chunk=min(chunk, length))
