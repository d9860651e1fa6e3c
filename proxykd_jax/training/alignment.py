"""Alignment of the proxy (paper, section 3.3): the phases of the warm-up and the rounds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from proxykd_jax.artifacts import digest_value, read_manifest
from proxykd_jax.data.order import permutation
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.losses import REFERENCE_LOSSES, batch_mean
from proxykd_jax.parallel.sharding import check_rows, tree_shardings
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.batch_objectives import AlignObjective
from proxykd_jax.training.batches import (
    Plan,
    Selection,
    answer_positions,
    check_any_rows,
    count_steps,
    make_plan,
    placed_batches,
    rows_together,
)
from proxykd_jax.training.checkpoint import Progress
from proxykd_jax.training.draw_answers import Answerer
from proxykd_jax.training.loop import Trainer
from proxykd_jax.training.model import Model
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.pairs import PairRows
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.programs import round_programs
from proxykd_jax.training.reference import LN_2, check_first_dpo_loss, store_references
from proxykd_jax.training.stage_run import StageRun
from proxykd_jax.training.state import TrainState
from proxykd_jax.training.steps import make_evaluation

# How many pairs of a round's slice its rewards are measured on after the round.
_REWARD_PAIRS = 256


def align_proxy(run: StageRun) -> None:
    """Trains the phases that are left and marks the stage complete.

    Raises:
      UserError: there are no rows to learn from, or a file does not fit the config.
    """
    if run.config.align.uses_pairs:
        check_sampling(run)
    phases = alignment_phases(run)
    rounds = sum(phase.name.startswith("round_") for phase in phases)
    run.train(
        phases,
        untrained="raw",
        counts={"rounds": rounds},
        optimizer=make_optimizer(run.config.align.optimizer, 1),
        before=_watched(run),
    )


def check_sampling(run: StageRun) -> None:
    """Checks the mesh on which the proxy answers before anything is trained.

    Raises:
      UserError: the mesh does not fit the model or the batch.
    """
    check_rows(run.config.align.sampling.batch_size, run.sample_mesh, "align.sampling.batch_size")
    tree_shardings((run.model.frozen, run.model.trainable), run.sample_mesh)


def alignment_phases(run: StageRun) -> list[Phase]:
    """Returns the warm-up on D_w and one phase for each round; none with ``alignment: none``.

    Raises:
      UserError: there are no rows to learn from.
    """
    align, corpus = run.config.align, run.corpus
    if align.alignment == "none":
        return []
    check_any_rows(corpus, ("warmup", "align"))
    warmup, slices = corpus.split("warmup"), round_slices(run)
    # A decaying learning rate is planned over the steps that are taken if nothing stops earlier.
    counts = [len(warmup) * align.warmup_epochs]
    counts += [len(part) * align.epochs_per_round for part in slices]
    optimizer = make_optimizer(
        align.optimizer, sum(-(-count // align.batch_size) for count in counts)
    )

    def nll_phase(name: str, rows: Any, epochs: int, most: int | None) -> Phase:
        return run.nll_phase(
            name,
            rows,
            lambda steps: optimizer,
            order=f"align/{name}",
            epochs=epochs,
            most=most,
            program=name.partition("_")[0],
            weight=align.nll_weight,
            after=_watched(run),
            keep=True,
        )

    phases = [nll_phase("warmup", warmup, align.warmup_epochs, align.warmup_max_steps)]
    for index, part in enumerate(slices, start=1):
        rows = Selection(corpus.split("align"), part)
        if align.uses_pairs:
            phase = _Round(run, index, rows, optimizer).phase()
        else:
            phase = nll_phase(_name(index), rows, align.epochs_per_round, align.round_max_steps)
        before = phases[-1].name
        phases.append(phase.with_(ends_stage=_ends_alignment(run, before)))
    return phases


def round_slices(run: StageRun) -> list[np.ndarray]:
    """Cuts D_p into disjoint slices, one for each round; there are never more slices than rows."""
    align = run.config.align
    if align.alignment not in ("nll", "nll_preference"):
        return []
    count = len(run.corpus.split("align"))
    order = permutation(count, seed=purpose_seed(run.config.seed, "slices"), epoch=0)
    parts = np.array_split(order, min(align.num_rounds, max(count, 1)))
    return [np.asarray(part, np.int32) for part in parts if len(part)]


def _name(index: int) -> str:
    return f"round_{index:02d}"


def _ends_alignment(run: StageRun, before: str) -> Callable[[Progress], bool]:
    """Returns a test: did the round bring no new best, and does the config then end the alignment?

    Args:
      run: the run of the stage.
      before: name of the phase before the round.
    """

    def ends(progress: Progress) -> bool:
        if not run.config.align.stop_rounds or progress.best_step is None:
            return False
        steps = {result["phase"]: result["step"] for result in progress.results}
        return progress.best_step <= steps[before]

    return ends


def _watched(run: StageRun) -> Callable[[TrainState], dict[str, float]]:
    """Returns what measures the proxy on D_s, unseen in training, if no validation rows exist."""
    held_out = run.corpus.split("distill")
    if len(run.corpus.split("validation")) or not len(held_out):
        return lambda state: {}

    def figures(state: TrainState) -> dict[str, float]:
        found = run.watch(held_out, state, run.model.spec)
        return {f"held_out/{name}": value for name, value in found.items()}

    return figures


class _Round:
    """A round of NLL and preference (eq. 6), and what it does before and after its steps.

    Args:
      run: the run of the stage.
      index: number of the round, from 1.
      rows: the round's slice of D_p.
      optimizer: the stage's optimizer.
    """

    def __init__(
        self,
        run: StageRun,
        index: int,
        rows: Selection,
        optimizer: optax.GradientTransformation,
    ) -> None:
        self._run, self._index, self._rows, self._optimizer = run, index, rows, optimizer
        self._align = run.config.align
        self._objective = AlignObjective.of(self._align)

    def phase(self) -> Phase:
        """Returns the round as known before sampling: with its steps, without its batches."""
        align, rows = self._align, self._rows
        options: dict[str, Any] = {"epochs": align.epochs_per_round, "most": align.round_max_steps}
        plan = self._run.plan(rows.lengths - 1, self._order, packs=False, **options)
        return self._run.phase(
            _name(self._index),
            self._objective,
            self._optimizer,
            rows,
            plan,
            count_steps(plan, **options),
            prepare=self._prepare,
            keep=True,
            programs=functools.partial(round_programs, self._run),
        )

    def _prepare(self, phase: Phase, trainer: Trainer) -> Phase:
        """Draws y-hat for the slice and computes the reference log-probs of y and y-hat."""
        samples, times = self._sample(trainer)
        pairs = self._pairs(samples)
        counts = {f"samples/{name}": value for name, value in samples.counts().items()}

        def after(state: TrainState) -> Mapping[str, float]:
            rewards = self._rewards(trainer, phase.frozen, pairs, state)
            return {**rewards, **counts, **_watched(self._run)(state), **times}

        return phase.with_(
            plan=self._pair_plan(pairs),
            collate=pairs.collate,
            check_first=lambda metrics: self._check_first_loss(metrics, pairs, samples),
            after=after,
        )

    def _sample(self, trainer: Trainer) -> tuple[SampleStore, dict[str, float]]:
        run, sampling = self._run, self._align.sampling
        store = SampleStore(run.config.folder / "samples" / _name(self._index))
        settings = {"round": self._index, **sampling.decisive}
        # These decide the answering proxy, even if its folder has changed since.
        alignment = read_manifest(run.folder)
        inputs = {"alignment": digest_value({k: alignment[k] for k in ("settings", "inputs")})}
        if store.begin(settings, inputs):
            return store, {}
        model = run.model.at(trainer.state.trainable)
        started, there = time.perf_counter(), len(store)
        self._draw_answers(store, model, trainer)
        if self._align.preference.loss in REFERENCE_LOSSES:
            self._compute_references(store, model, trainer)
        # Both figures count this process alone: 0 rows if a killed process had drawn all answers.
        seconds = time.perf_counter() - started
        store.complete()
        return store, {"time/sampling_s": seconds, "time/sampled_rows": len(store) - there}

    def _draw_answers(self, store: SampleStore, model: Model, trainer: Trainer) -> None:
        run, sampling = self._run, self._align.sampling
        Answerer(run.config, run.corpus, model.config, model.weights, run.sample_mesh).fill(
            store,
            run.corpus.split("align"),
            self._rows.rows,
            round_index=self._index,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            against_teacher=True,
            report=trainer.console.parts(f"round {self._index}: sampled"),
        )

    def _compute_references(self, store: SampleStore, model: Model, trainer: Trainer) -> None:
        pairs, align = self._pairs(store), self._align
        store_references(
            store,
            self._pair_plan(pairs),
            pairs.collate,
            model,
            rows=self._rows,
            plan_chosen=lambda rows: self._run.plan(
                rows.lengths - 1,
                self._order,
                epochs=1,
                most=None,
                packs=False,
                answers=answer_positions(rows),
            ),
            microbatches=align.microbatches,
            batches_per_part=max(align.sampling.rows_per_part // align.batch_size, 1),
            mesh=self._run.mesh,
            report=trainer.console.parts(f"round {self._index}: reference of"),
        )

    @property
    def _order(self) -> str:
        return f"align/{_name(self._index)}"

    def _pairs(self, samples: SampleStore) -> PairRows:
        return PairRows(self._rows, samples, self._align.preference, self._run.model.config)

    def _pair_plan(self, pairs: PairRows) -> Plan:
        return self._run.plan(
            pairs.positions,
            self._order,
            epochs=self._align.epochs_per_round,
            most=self._align.round_max_steps,
            packs=False,
            answers=pairs.answers,
            max_length=pairs.longest(self._run.corpus.max_length),
        )

    def _check_first_loss(
        self, metrics: dict[str, float], pairs: PairRows, samples: SampleStore
    ) -> None:
        """Checks that the first loss is ln 2: policy and reference are still the same model."""
        preference = self._align.preference
        if preference.loss == "dpo":
            check_first_dpo_loss(
                metrics["preference"],
                self._run.model.spec,
                beta=preference.beta,
                tokens=pairs.mean_tokens,
                folder=samples.folder,
            )

    def _rewards(
        self, trainer: Trainer, frozen: Any, pairs: PairRows, state: TrainState
    ) -> dict[str, float]:
        """Measures reward margins and accuracy after the round, on some pairs of its slice."""
        run = self._run
        evaluate = make_evaluation(run.model.spec, self._objective)
        plan = make_plan(
            pairs.positions[:_REWARD_PAIRS],
            seed=0,
            batch_size=self._align.batch_size,
            batching="bucket",
            max_length=pairs.longest(run.corpus.max_length),
            answers=pairs.answers[:_REWARD_PAIRS],
            together=rows_together(self._align.batch_size, 1, run.mesh),
        )
        total: Any = None
        batches = placed_batches(plan, pairs.collate, start=0, stop=len(plan(0)), mesh=run.mesh)
        for batch in batches:
            terms = evaluate(state, frozen, batch)
            total = terms if total is None else jax.tree.map(lambda a, b: a + b, total, terms)
        figures = {name: float(batch_mean(term)) for name, term in total.items()}
        if self._align.preference.loss == "dpo" and abs(figures["preference"] - LN_2) < 1e-5:
            trainer.console.say(
                f"WARNING: after {_name(self._index)} the DPO loss is still ln 2: the proxy did "
                "not move away from its reference. Check the learning rate and the reference."
            )
        names = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
        return {f"after/{name}": figures[name] for name in (*names, "preference")}
