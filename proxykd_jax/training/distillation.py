"""Distillation of the student (paper, section 3.4): NLL of texts and KL to stored soft labels.

One phase is a student's whole training on rows that are on disk. Proxy-KD uses it, and so do the
methods that differ only in rows, weights or labels (``proxykd_jax.baselines``).
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus, TokenSplit
from proxykd_jax.data.soft_labels import SoftLabelStore, Weights, weights_of
from proxykd_jax.generation.fresh_split import AnsweredSplit
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.training.batch_objectives import DistillObjective
from proxykd_jax.training.batches import (
    Joined,
    ReadLabels,
    answer_positions,
    check_any_rows,
    count_steps,
    distill_collate,
)
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import label_programs
from proxykd_jax.training.stage_run import StageRun

FRESH = "fresh"


def teacher_splits(config: Config) -> tuple[str, ...]:
    """Returns the splits whose teacher's answers the student learns from."""
    return ("distill",) if config.distill.data == "distill" else ("warmup", "align", "distill")


def teacher_rows(config: Config, corpus: TokenCorpus) -> dict[str, Rows]:
    """Returns the teacher's answers that the student learns from, by split.

    Raises:
      UserError: there are none.
    """
    check_any_rows(corpus, teacher_splits(config))
    found: dict[str, Rows] = {name: corpus.split(name) for name in teacher_splits(config)}
    return {name: rows for name, rows in found.items() if len(rows)}


def fresh_rows(run: StageRun) -> dict[str, Rows]:
    """Returns fresh prompts with the proxy's answers from ``score``; empty if there are none."""
    if not len(run.corpus.split(FRESH)):
        return {}
    answered = answered_rows(run, FRESH, run.corpus.split(FRESH))
    return {FRESH: answered} if len(answered) else {}


def answered_rows(run: StageRun, name: str, prompts: TokenSplit) -> Rows:
    """Returns the proxy's answers from the store ``name``; a sketch has the prompts alone."""
    if run.scorer is not None:
        return prompts
    return AnsweredSplit(prompts, SampleStore(run.config.folder / "samples" / name))


@dataclass(frozen=True)
class DrawnTargets:
    """Targets drawn at random. Their logs take the place of a soft label's log-probs.

    Attributes:
      read: functions that read them, by split.
      slots: ids at each position.
    """

    read: Mapping[str, ReadLabels]
    slots: int


def text_phase(run: StageRun, splits: Mapping[str, Rows]) -> Phase:
    """Returns the student's training by the NLL of texts alone."""
    distill, rows = run.config.distill, Joined(splits)
    phase = run.nll_phase(
        "train",
        rows,
        lambda steps: make_optimizer(distill.optimizer, steps),
        order="distill",
        epochs=distill.epochs,
        most=distill.max_steps,
        program="distill",
        weight=distill.nll_weight,
    )
    return phase.with_(before=lambda state: planned_figures(rows, phase.steps))


def label_phase(
    run: StageRun,
    splits: Mapping[str, Rows],
    *,
    nll_splits: Collection[str],
    rescale: bool = True,
    drawn: DrawnTargets | None = None,
) -> Phase:
    """Returns the student's training by NLL + alpha x weighted KL (eq. 11).

    Args:
      run: a run with the soft labels of these rows.
      splits: rows by the names under which they were scored.
      nll_splits: splits whose answers also have the NLL; the others have the KL alone, of weight 1.
      rescale: whether the KL at temperature T is multiplied by T^2.
      drawn: targets that replace the stored distribution.
    """
    config, rows = run.config, Joined(splits)
    ids = config.score.top_k if drawn is None else drawn.slots
    objective = DistillObjective.of(
        config.distill, config.score.temperature, rescale=rescale, drawn=drawn is not None
    )
    options: dict[str, Any] = {"epochs": config.distill.epochs, "most": config.distill.max_steps}
    plan = run.plan(rows.lengths - 1, "distill", answers=answer_positions(rows), **options)
    steps = count_steps(plan, **options)
    phase = run.phase(
        "train",
        objective,
        make_optimizer(config.distill.optimizer, steps),
        rows,
        plan,
        steps,
        programs=functools.partial(label_programs, run, ids),
    )
    if run.scorer is not None:  # a sketch has no labels
        return phase
    labels = run.stored_labels
    weights = _weights(config, splits, labels, nll_splits)
    stored = {name: functools.partial(labels.read, name) for name in splits}
    read = stored if drawn is None else drawn.read
    sample_weights = {name: found.sample_weight for name, found in weights.items()}
    return phase.with_(
        collate=distill_collate(rows, read, sample_weights, nll_splits, top_k=ids),
        before=lambda state: {**planned_figures(rows, steps), **_weight_figures(weights)},
    )


def planned_figures(rows: Rows, steps: int) -> dict[str, int]:
    """Returns what every method logs about its student's training before the first step."""
    return {"rows": len(rows), "planned_steps": steps}


def _weights(
    config: Config,
    splits: Mapping[str, Rows],
    labels: SoftLabelStore,
    nll_splits: Collection[str],
) -> dict[str, Weights]:
    """Returns the weights of eq. 9, on each split separately: the proxy was trained on D_p, so its
    likelihoods there are not comparable with the others. A fresh prompt's answer has weight 1."""
    weight = config.distill.weights
    return {
        name: weights_of(
            labels.seq_logliks(name),
            labels.lengths(name),
            labels.finished(name),
            loglik=weight.loglik,
            normalize=weight.normalize,
            enabled=weight.enabled and name in nll_splits,
        )
        for name in splits
    }


def _weight_figures(weights: Mapping[str, Weights]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, found in weights.items():
        figures[f"weights/{name}/mean"] = float(np.mean(found.sample_weight))
        figures[f"weights/{name}/length_correlation"] = found.length_correlation
        figures[f"weights/{name}/loglik_mean"] = found.loglik_mean
        figures[f"weights/{name}/loglik_std"] = found.loglik_std
    return figures
