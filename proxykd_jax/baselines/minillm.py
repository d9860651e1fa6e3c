"""MiniLLM (arXiv 2306.08543): the reverse KL of whole answers, by policy gradient.

A step draws ``rollouts`` answers from a mixture of scorer and student and stores both models'
log-probs of the tokens. It then makes ``inner_epochs`` passes over the answers, with one update for
each ``distill.batch_size`` of them, and discards them. The gradient of KL(q || p) over answers is
split: a token's own reward is computed exactly, as KL(q_t || p_t) over the vocabulary, and later
rewards enter by a clipped policy gradient. A key states each difference between the paper and the
authors' code; the defaults are the paper's.

A step is a whole rollout, so no checkpoint falls inside one. An interrupted run draws its last
rollout again from the same student and continues with the same bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.baselines.beside_scorer import (
    ScoredSpec,
    beside_scorer,
    both_logits,
    sampling_time_logps,
    scorer_text,
)
from proxykd_jax.baselines.online import prompt_plan, warmup_phase
from proxykd_jax.baselines.rollouts import (
    AnswerBatch,
    Answering,
    answer_batch,
    answer_figures,
    read_places,
)
from proxykd_jax.baselines.sampling_programs import (
    answer_shapes,
    scored_answer_program,
    scored_step_program,
    scorer_cost,
    scorer_of,
)
from proxykd_jax.config.online_methods import MiniLlm
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.order import permutation
from proxykd_jax.generation.decode import Mixing
from proxykd_jax.losses import (
    Term,
    batch_count,
    batch_terms,
    forward_kl_tokens,
    log_ratio_rewards,
    mixed_objective,
    mixture_weights,
    policy_gradient_tokens,
    rewards_to_go,
    single_step_kl_tokens,
    token_logps,
    whiten,
)
from proxykd_jax.models.operations import forward_flops
from proxykd_jax.parallel.processes import fetch
from proxykd_jax.parallel.sharding import bytes_per_device, put_rows
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.abstract import (
    Cost,
    Lengths,
    Program,
    abstract_rows,
    place,
    place_rows,
    state_of,
    weights_read,
)
from proxykd_jax.training.batch_objectives import Counts, Metrics, Objective, nll_term
from proxykd_jax.training.batches import Joined, planned_steps, token_collate
from proxykd_jax.training.distillation import planned_figures, teacher_rows
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.phase import MakeBatch, Phase
from proxykd_jax.training.programs import longest
from proxykd_jax.training.scoring import SCORER_TEXT, Scoring
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState, Tree, Weights
from proxykd_jax.training.steps import Step
from proxykd_jax.types import TokenBatch

AnchorBatch = Callable[[int], TokenBatch | None]


def to_score(scoring: Scoring) -> dict[str, Rows]:
    """Returns nothing: the scorer is loaded while the student trains."""
    return {}


def phases(run: StageRun) -> list[Phase]:
    """Returns the warm-up, then the rollouts and their updates."""
    config, method = run.config, run.config.method
    assert isinstance(method, MiniLlm)
    teacher = teacher_rows(config, run.corpus)
    from_scorer = method.warms_up and method.warmup_text == SCORER_TEXT
    written = scorer_text(run) if method.reads_scorer_text else {}
    prompts = Joined(teacher)
    plan, steps = prompt_plan(run, method, prompts)
    updates = method.updates_a_step(config.distill.batch_size)
    optimizer = make_optimizer(config.distill.optimizer, steps * updates)
    phase = run.phase(
        "train",
        MiniLlmObjective.of(method),
        optimizer,
        prompts,
        plan,
        steps,
        before=lambda state: {**planned_figures(prompts, steps), "updates_a_step": updates},
        programs=functools.partial(_programs, run, method),
        **beside_scorer(run),
    )
    load_scorer, answering = phase.prepare, Answering.of(run, method, 1.0)
    anchor = _anchor(run, written) if method.anchor != "none" else lambda update: None

    def prepare(phase: Phase, trainer: Trainer) -> Phase:
        assert load_scorer is not None
        phase = load_scorer(phase, trainer)
        return phase.with_(make_batch=_make_rollout(run, answering, prompts, phase))

    return [
        warmup_phase(run, method, written if from_scorer else teacher),
        phase.with_(prepare=prepare, make_step=functools.partial(_updates, run, method, anchor)),
    ]


def _programs(run: StageRun, method: MiniLlm, phase: Phase) -> list[Program]:
    """Returns the programs for answers, for both models' log-probs of them, and for an update."""
    length, anchored, scorer = longest(run), method.anchor != "none", scorer_of(run)
    mixing = None
    if method.teacher_mixing > 0:
        mixing = Mixing(scorer.spec.config, method.teacher_mixing)

    def batch(rows: int) -> RolloutBatch:
        values = jax.ShapeDtypeStruct((rows, length), jnp.float32)
        anchor = abstract_rows(rows, length) if anchored else None
        return RolloutBatch(answer_shapes(rows, length), values, values, values, anchor)

    return [
        scored_answer_program(run, method, phase, mixing=mixing),
        _logps_program(run, phase),
        scored_step_program(
            run,
            phase,
            batch_of=batch,
            answers=2 if anchored else 1,
            times=method.inner_epochs,
        ),
    ]


def _logps_program(run: StageRun, phase: Phase) -> Program:
    """Returns the program for both models' log-probs of an update's answers at sampling time."""
    length, student = longest(run), run.model
    weights = (student.trainable, phase.frozen)

    def lower(mesh: Mesh, rows: int) -> list[Any]:
        batch = place_rows(abstract_rows(rows, length), mesh)
        placed = (place(tree, mesh) for tree in weights)
        return [sampling_time_logps.lower(*placed, batch, spec=phase.spec)]

    def cost(axes: dict[str, int], rows: int, lengths: Lengths) -> Cost:
        seen = scorer_cost(run, axes, rows, lengths)
        flops = forward_flops(student.spec.config, rows, lengths.row)
        return Cost(seen.flops + flops, seen.bytes_moved + weights_read(student, axes))

    return Program(
        "logps",
        "distill",
        student.spec.config.num_params,
        run.config.distill.batch_size,
        lower,
        lambda axes: bytes_per_device(weights, axes),
        lambda mesh: bytes_per_device(state_of(phase).opt_state, dict(mesh.shape)),
        cost,
        whole=True,
    )


# --- a rollout ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """The answers of a step, as NumPy arrays.

    Attributes:
      step: step of the phase.
      answers: one answer per row.
    """

    step: int
    answers: AnswerBatch


def _make_rollout(run: StageRun, answering: Answering, prompts: Rows, phase: Phase) -> MakeBatch:
    """Returns a function that draws answers from the mixture of scorer and current student."""
    planned, method, spec = planned_steps(phase.plan), answering.method, phase.spec
    assert isinstance(spec, ScoredSpec) and isinstance(method, MiniLlm)
    mixes = method.teacher_mixing > 0
    if mixes:
        mixing = Mixing(spec.scorer.config, method.teacher_mixing)
        answering = dataclasses.replace(answering, mixing=mixing)

    def make_batch(state: TrainState, frozen: Tree, step: int) -> Rollout:
        student, places = run.model.at(state.trainable), read_places(prompts, planned(step))
        other = frozen["scorer"] if mixes else None
        answers = answering.answer(student, places, step, other)
        return Rollout(step, answer_batch(answers, run.corpus.max_length))

    return make_batch


def _updates(run: StageRun, method: MiniLlm, anchor: AnchorBatch, phase: Phase) -> Step:
    """Returns ``step(state, frozen, rollout)``: all updates on a rollout, with mean metrics."""
    size, update, spec = run.config.distill.batch_size, phase.update(), phase.spec
    assert isinstance(spec, ScoredSpec)

    def step(
        state: TrainState, frozen: Tree, rollout: Rollout
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        drawn = rollout.answers
        old_BL, scorer_BL = (np.zeros(drawn.rows.mask_BL.shape, np.float32) for _ in range(2))
        for first in range(0, len(old_BL), size):
            part = slice(first, first + size)
            rows = put_rows(jax.tree.map(lambda x, part=part: x[part], drawn.rows), run.mesh)
            found = fetch(sampling_time_logps(state.trainable, frozen, rows, spec=spec))
            old_BL[part], scorer_BL[part] = found
        all_metrics = []
        for number, places in enumerate(
            inner_batches(
                drawn.rows.mask_BL.any(axis=1),
                size,
                epochs=method.inner_epochs,
                seed=purpose_seed(run.config.seed, f"distill/inner/{rollout.step}"),
            )
        ):
            answers = take_answers(drawn, places)
            batch = rollout_batch(
                answers,
                old_BL[places],
                scorer_BL[places],
                anchor(rollout.step * method.updates_a_step(size) + number),
                method,
            )
            batch = put_rows(jax.tree.map(np.asarray, batch), run.mesh)
            state, metrics = update(state, frozen, batch)
            all_metrics.append(metrics)
        return state, jax.tree.map(lambda *found: sum(found) / len(found), *all_metrics)

    return step


def inner_batches(
    there_R: np.ndarray, size: int, *, epochs: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields the rows of each update, ``size`` places; each epoch shuffles the answers anew.

    Args:
      there_R: bool, True for answers that have a token; the others are in no update.
      size: rows of an update; places without an answer hold -1.
      epochs: number of passes over the answers.
      seed: seed of the order.
    """
    rows = np.flatnonzero(there_R)
    for epoch in range(epochs):
        order = rows[permutation(len(rows), seed=seed, epoch=epoch)]
        for start in range(0, len(order), size):
            places = order[start : start + size]
            yield np.concatenate([places, np.full(size - len(places), -1)])


def take_answers(answers: AnswerBatch, places: Any) -> AnswerBatch:
    """Returns the answers at ``places``; a place of -1 becomes a row without an answer."""
    taken = jax.tree.map(lambda x: x[places], answers)
    rows, there_B = taken.rows, places >= 0
    rows = rows.replace(
        mask_BL=rows.mask_BL & there_B[:, None],
        example_mask_BS=rows.example_mask_BS & there_B[:, None],
    )
    return AnswerBatch(rows, taken.finished_B & there_B, taken.sampled_B & there_B)


def _anchor(run: StageRun, text: dict[str, Rows]) -> AnchorBatch:
    """Returns a function from an update to its batch of the scorer's text."""
    rows = Joined(text)
    distill = run.config.distill
    plan = run.plan(
        rows.lengths - 1,
        "distill/anchor",
        epochs=distill.epochs,
        most=distill.max_steps,
        packs=False,
    )
    collate, planned = token_collate(rows), planned_steps(plan)

    def batch(update: int) -> TokenBatch:
        return collate(planned(update))

    return batch


# --- an update ------------------------------------------------------------------------------------


@flax.struct.dataclass
class RolloutBatch:
    """The answers of an update, with values that were computed when they were drawn.

    Attributes:
      answers: one answer per row.
      old_logps_BL: float32, the student's log-probs of the tokens at sampling time.
      advantages_BL: float32.
      importance_weights_BL: float32, w_t = q / (a p + (1 - a) q) of the tokens.
      anchor: rows of the scorer's text; None without an anchor.
    """

    answers: AnswerBatch
    old_logps_BL: Any
    advantages_BL: Any
    importance_weights_BL: Any
    anchor: TokenBatch | None


def rollout_batch(
    answers: AnswerBatch,
    old_logps_BL: Any,
    scorer_logps_BL: Any,
    anchor: TokenBatch | None,
    method: MiniLlm,
) -> RolloutBatch:
    """Computes the rewards, returns and weights of an update's answers; it can be traced.

    Advantages are whitened over the whole update, whatever the number of micro-batches. The
    authors' code whitens them over each micro-batch of all devices.
    """
    mask_BL = answers.rows.mask_BL
    reward_BL = log_ratio_rewards(
        scorer_logps_BL,
        old_logps_BL,
        mask_BL,
        scale=method.reward_scale,
        clip=method.reward_clip,
    )
    advantage_BL = rewards_to_go(
        reward_BL,
        mask_BL,
        include_current=method.include_current,
        discount=method.discount,
        length_normalize=method.length_normalize,
    )
    if method.whiten != "none":
        advantage_BL = whiten(advantage_BL, mask_BL, include_padding=method.whiten == "padding_too")
    weight_BL = mixture_weights(
        scorer_logps_BL, old_logps_BL, mask_BL, scorer_share=method.teacher_mixing
    )
    return RolloutBatch(answers, old_logps_BL, advantage_BL, weight_BL, anchor)


@dataclass(frozen=True)
class MiniLlmObjective:
    """w_t KL(q_t || p_t) + max(-A rho, -A clip(rho)), averaged over tokens, plus the anchor.

    There is no dropout, because it would change the policy from the one that drew the answers.

    Attributes:
      clip: eps of the clipped ratio, or None.
      weight_single_step: whether w_t also multiplies the exact term.
      anchor_weight: weight of the loss on the scorer's text; 0 without an anchor.
      anchor_kl_share: share of that loss that is KL(p || q) instead of NLL.
    """

    clip: float | None
    weight_single_step: bool
    anchor_weight: float
    anchor_kl_share: float

    @staticmethod
    def of(method: MiniLlm) -> MiniLlmObjective:
        anchor_weight = 0.0 if method.anchor == "none" else method.anchor_weight
        return MiniLlmObjective(
            method.clip, method.weight_single_step, anchor_weight, method.anchor_kl_share
        )

    def counts(self, batch: RolloutBatch) -> Counts:
        tokens = batch_count(batch.answers.rows.mask_BL, reduction="token_mean")
        counts = {"single_step": tokens, "policy_gradient": tokens}
        if batch.anchor is not None:
            anchor = batch_count(batch.anchor.mask_BL, reduction="token_mean")
            counts |= {"anchor_nll": anchor, "anchor_kl": anchor}
        return counts

    def share(
        self,
        models: dict[str, Weights],
        batch: RolloutBatch,
        counts: Counts,
        spec: ScoredSpec,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, Metrics]:
        rows = batch.answers.rows

        def values(student: jax.Array, scorer: jax.Array, *arrays: jax.Array) -> Any:
            labels, mask, weight = arrays
            single = single_step_kl_tokens(
                scorer,
                student,
                mask,
                importance_weights_BL=weight if self.weight_single_step else None,
            )
            return single, token_logps(student, labels)

        single_BL, logps_BL = both_logits(
            models, rows, spec, values, rows.labels_BL, rows.mask_BL, batch.importance_weights_BL
        )
        gradient_BL = policy_gradient_tokens(
            logps_BL,
            batch.old_logps_BL,
            batch.advantages_BL,
            rows.mask_BL,
            clip=self.clip,
            importance_weights_BL=batch.importance_weights_BL,
        )
        terms = {
            "single_step": _token_mean(single_BL, rows),
            "policy_gradient": _token_mean(gradient_BL, rows),
        }
        weights = {"single_step": 1.0, "policy_gradient": 1.0}
        if batch.anchor is not None:
            terms |= self._anchor_terms(models, batch.anchor, spec)
            weights["anchor_nll"] = self.anchor_weight * (1 - self.anchor_kl_share)
            weights["anchor_kl"] = self.anchor_weight * self.anchor_kl_share
        loss, metrics = mixed_objective(terms, weights, counts=counts)
        advantage = _token_mean(batch.advantages_BL, rows)
        return loss, {**metrics, "advantage": advantage, **answer_figures(batch.answers)}

    def _anchor_terms(
        self, models: dict[str, Weights], rows: TokenBatch, spec: ScoredSpec
    ) -> Metrics:
        def values(student: jax.Array, scorer: jax.Array, *arrays: jax.Array) -> Any:
            labels, mask = arrays
            return token_logps(student, labels), forward_kl_tokens(scorer, student, mask)

        logps_BL, kl_BL = both_logits(models, rows, spec, values, rows.labels_BL, rows.mask_BL)
        return {
            "anchor_nll": nll_term(logps_BL, rows, rows.mask_BL, "token_mean"),
            "anchor_kl": _token_mean(kl_BL, rows),
        }

    def terms(self) -> dict[str, Objective]:
        return {}


def _token_mean(values_BL: jax.Array, rows: TokenBatch) -> Term:
    return batch_terms(values_BL, rows.mask_BL, reduction="token_mean")
