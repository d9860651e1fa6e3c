"""Alignment of the proxy (paper, 3.3): the pieces that ``align.main`` puts in order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from proxykd_jax.artifacts import MANIFEST, digest_value, read_json
from proxykd_jax.config import Config
from proxykd_jax.data.collate import Rows
from proxykd_jax.data.corpus import TokenCorpus
from proxykd_jax.data.order import Batching, permutation
from proxykd_jax.generation.samples import SampleStore
from proxykd_jax.losses import REFERENCE_LOSSES, batch_mean
from proxykd_jax.parallel.mesh import make_mesh
from proxykd_jax.parallel.sharding import check_rows, tree_shardings
from proxykd_jax.training.answers import draw_answers
from proxykd_jax.training.batches import (
    Plan,
    Selection,
    answer_positions,
    check_any_rows,
    count_steps,
    make_plan,
    phase_seed,
    placed_batches,
    rows_together,
    token_collate,
)
from proxykd_jax.training.loop import Measure, Trainer
from proxykd_jax.training.metrics import MetricsLog
from proxykd_jax.training.model import Model
from proxykd_jax.training.objectives import AlignObjective, NllObjective, Objective
from proxykd_jax.training.optimizer import make_optimizer
from proxykd_jax.training.pairs import PairRows
from proxykd_jax.training.reference import LN_2, check_first_dpo_loss, store_references
from proxykd_jax.training.state import TrainState
from proxykd_jax.training.steps import make_diagnosis, make_evaluation, make_train_step

# Pairs of a round's slice that its rewards are measured on afterwards.
_REWARD_PAIRS = 256


class Alignment:
    """One run of the stage: what it has, and what it does in each phase.

    Phases are numbered: 0 is the look at the raw proxy, 1 the warm-up, 1 + i round i. Those that
    a checkpoint says are over return at once.

    Args:
      config: of the run.
      corpus: from ``prepare``.
      model: the proxy, as loaded.
      mesh: of devices.
      log: metrics.jsonl.
      measure: ``(model, rows, most) -> {"nll", "agreement"}`` on held-out rows.

    Raises:
      UserError: there are no rows to learn from.
    """

    def __init__(
        self,
        config: Config,
        corpus: TokenCorpus,
        model: Model,
        mesh: Mesh,
        log: MetricsLog,
        measure: Measure,
    ) -> None:
        self._config, self._align = config, config.align
        self._corpus, self._model, self._mesh, self._measure = corpus, model, mesh, measure
        self._folder = config.folder / "proxy"
        self._sample_mesh = make_mesh(config.mesh.of("sample"))
        self._sampling_times: dict[str, float] = {}
        if self._align.uses_pairs:
            batch_size = self._align.sampling.batch_size
            check_rows(batch_size, self._sample_mesh, "align.sampling.batch_size")
            tree_shardings((model.frozen, model.trainable), self._sample_mesh)  # or an error, now
        if self._align.alignment != "none":
            check_any_rows(corpus, ("warmup", "align"))
        self._rounds = self._slices()
        self._optimizer = make_optimizer(config.align.optimizer, self._planned_steps())
        validation = corpus.split("validation")
        # Without validation rows the proxy is watched on D_s, which it never learns from.
        held_out = corpus.split("distill")
        self._watch = None if len(validation) or not len(held_out) else self._on(held_out)
        self._trainer = Trainer.open(
            "align",
            self._folder,
            model,
            self._optimizer,
            mesh=mesh,
            log=log,
            every=self._align,
            validate=self._on(validation) if len(validation) else None,
        )

    # --- phases -----------------------------------------------------------------------------------

    def look_at_raw_proxy(self) -> None:
        """Figures before any training; also the checkpoint of step 0."""
        if self._trainer.progress.phase == 0:
            self._trainer.check_validation("raw")
            self._trainer.finish_phase("raw", self._watched(), keep=True)

    def warm_up(self) -> None:
        """NLL on D_w."""
        if self._trainer.progress.phase > 1:
            return
        split = self._corpus.split("warmup")
        self._train_nll("warmup", split, self._align.warmup_epochs, self._align.warmup_max_steps)
        self._trainer.finish_phase("warmup", self._watched(), keep=True)

    def sample(self, round_index: int) -> SampleStore | None:
        """Draws y-hat for the round's slice, with the reference log-probs of y and y-hat."""
        if self._is_over(round_index) or not self._align.uses_pairs:
            return None
        store = SampleStore(self._config.folder / "samples" / _round_name(round_index))
        sampling = self._align.sampling
        settings = {"round": round_index, **sampling.decisive}
        # The proxy that answers is a function of these, whatever became of its folder since.
        alignment = read_json(self._folder / MANIFEST)
        inputs = {"alignment": digest_value({k: alignment[k] for k in ("settings", "inputs")})}
        self._sampling_times = {}
        if store.begin(settings, inputs):
            return store
        model = self._model.at(self._trainer.state.trainable)
        started, there = time.perf_counter(), len(store)
        self._draw_answers(store, round_index, model)
        if self._align.preference.loss in REFERENCE_LOSSES:
            self._compute_references(store, round_index, model)
        # Of the answers that this process has drawn: none, where a killed one had drawn all.
        seconds = time.perf_counter() - started
        self._sampling_times = {
            "time/sampling_s": seconds,
            "time/sampled_rows": len(store) - there,
        }
        store.complete()
        return store

    def train_round(self, round_index: int, samples: SampleStore | None) -> None:
        """NLL and preference on the round's slice; a checkpoint that stays ends it."""
        if self._is_over(round_index):
            return
        phase, rows = _round_name(round_index), self._round_rows(round_index)
        if samples is None:
            self._train_nll(phase, rows, self._align.epochs_per_round, self._align.round_max_steps)
            self._trainer.finish_phase(phase, self._watched(), keep=True)
            return
        pairs = self._pairs(rows, samples)
        plan = self._pair_plan(phase, pairs)
        steps = count_steps(plan, self._align.epochs_per_round, self._align.round_max_steps)
        start = self._trainer.progress.phase_step
        self._trainer.run_phase(
            phase,
            self._step_of(self._pair_objective),
            placed_batches(plan, pairs.collate, start=start, stop=steps, mesh=self._mesh),
            steps,
            diagnose=self._diagnosis_of(self._pair_objective),
            check_first=lambda metrics: self._check_first_loss(metrics, pairs, samples),
        )
        rewards = self._rewards(phase, pairs)
        counts = {f"samples/{name}": value for name, value in samples.counts().items()}
        self._trainer.finish_phase(
            phase, {**rewards, **counts, **self._watched()}, keep=True, times=self._sampling_times
        )

    def converged(self, round_index: int) -> bool:
        """Whether the round brought no new best, where that ends the alignment."""
        results = {r["phase"]: r for r in self._trainer.progress.results}
        before = "warmup" if round_index == 1 else _round_name(round_index - 1)
        best = self._trainer.progress.best_step
        if not self._align.stop_rounds or best is None:
            return False
        return best <= results[before]["step"]

    def finish(self) -> None:
        """Marks the stage complete."""
        self._trainer.finish(self._folder, {"rounds": len(self._rounds)})

    @property
    def num_rounds(self) -> int:
        """Rounds that have rows."""
        return len(self._rounds)

    # --- pieces -----------------------------------------------------------------------------------

    @property
    def _pair_objective(self) -> Objective:
        return AlignObjective.of(self._align)

    def _draw_answers(self, store: SampleStore, round_index: int, model: Model) -> None:
        sampling = self._align.sampling
        draw_answers(
            store,
            self._corpus.split("align"),
            self._rounds[round_index - 1],
            self._config,
            self._model.config,
            *model.weights,
            corpus=self._corpus,
            mesh=self._sample_mesh,
            round_index=round_index,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            against_teacher=True,
            report=self._parts_report(f"round {round_index}: sampled"),
        )

    def _compute_references(self, store: SampleStore, round_index: int, model: Model) -> None:
        rows, phase = self._round_rows(round_index), _round_name(round_index)
        pairs = self._pairs(rows, store)
        store_references(
            store,
            self._pair_plan(phase, pairs),
            pairs.collate,
            model,
            rows=rows,
            plan_chosen=lambda some: self._row_plan(phase, some, self._batching_of_pairs),
            microbatches=self._align.microbatches,
            batches_per_part=max(self._align.sampling.rows_per_part // self._align.batch_size, 1),
            mesh=self._mesh,
            report=self._parts_report(f"round {round_index}: reference of"),
        )

    def _parts_report(self, what: str) -> Callable[[int, int], None]:
        say = self._trainer.console.say
        return lambda done, total: say(f"{what} {done}/{total} parts")

    def _round_rows(self, round_index: int) -> Selection:
        return Selection(self._corpus.split("align"), self._rounds[round_index - 1])

    def _is_over(self, round_index: int) -> bool:
        return self._trainer.progress.phase > 1 + round_index

    def _slices(self) -> list[np.ndarray]:
        """D_p cut into disjoint slices, one a round; fewer rounds than rows."""
        if self._align.alignment not in ("nll", "nll_preference"):
            return []
        count = len(self._corpus.split("align"))
        order = permutation(count, seed=phase_seed(self._config.seed, "slices"), epoch=0)
        parts = np.array_split(order, self._align.num_rounds)
        return [np.asarray(part, np.int32) for part in parts if len(part)]

    def _planned_steps(self) -> int:
        """Steps if nothing stops earlier; a learning rate that falls is planned over them."""
        rows = [len(self._corpus.split("warmup")) * self._align.warmup_epochs]
        rows += [len(part) * self._align.epochs_per_round for part in self._rounds]
        return sum(-(-count // self._align.batch_size) for count in rows)

    def _on(self, rows: Rows) -> Callable[[TrainState], dict[str, float]]:
        most = self._config.corpus.validation_max_rows
        return lambda state: self._measure(self._model.at(state.trainable), rows, most)

    def _watched(self) -> dict[str, float]:
        if self._watch is None:
            return {}
        figures = self._watch(self._trainer.state)
        return {f"held_out/{name}": value for name, value in figures.items()}

    def _pairs(self, rows: Rows, samples: SampleStore) -> PairRows:
        return PairRows(rows, samples, self._align.preference, self._model.config)

    @property
    def _batching_of_pairs(self) -> Batching:
        """Pairs are never packed."""
        return "bucket" if self._align.batching == "pack" else self._align.batching

    def _pair_plan(self, phase: str, pairs: PairRows) -> Plan:
        return self._plan(
            phase,
            pairs.positions,
            pairs.answers,
            batching=self._batching_of_pairs,
            max_length=pairs.longest(self._corpus.max_length),
            epochs=self._align.epochs_per_round,
            most=self._align.round_max_steps,
        )

    def _row_plan(self, phase: str, rows: Rows, batching: Batching, **options: Any) -> Plan:
        return self._plan(
            phase,
            rows.lengths - 1,
            answer_positions(rows),
            batching=batching,
            max_length=self._corpus.max_length,
            **options,
        )

    def _plan(self, phase: str, positions: np.ndarray, answers: np.ndarray, **options: Any) -> Plan:
        return make_plan(
            positions,
            seed=phase_seed(self._config.seed, f"align/{phase}"),
            batch_size=self._align.batch_size,
            answers=answers,
            together=rows_together(self._align.batch_size, self._align.microbatches, self._mesh),
            **options,
        )

    def _step_of(self, objective: Objective) -> Any:
        return make_train_step(
            self._model.spec,
            objective,
            self._optimizer,
            microbatches=self._align.microbatches,
            seed=self._config.seed,
        )

    def _diagnosis_of(self, objective: Objective) -> Any:
        return make_diagnosis(self._model.spec, objective, microbatches=self._align.microbatches)

    def _train_nll(self, phase: str, rows: Rows, epochs: int, most: int | None) -> None:
        if not len(rows):
            return
        plan = self._row_plan(phase, rows, self._align.batching, epochs=epochs, most=most)
        steps = count_steps(plan, epochs, most)
        start = self._trainer.progress.phase_step
        objective = NllObjective(self._align.reduction, self._align.nll_weight)
        self._trainer.run_phase(
            phase,
            self._step_of(objective),
            placed_batches(plan, token_collate(rows), start=start, stop=steps, mesh=self._mesh),
            steps,
        )

    def _check_first_loss(
        self, metrics: dict[str, float], pairs: PairRows, samples: SampleStore
    ) -> None:
        """Policy and reference are the same model before a round's first step."""
        preference = self._align.preference
        if preference.loss == "dpo":
            check_first_dpo_loss(
                metrics["preference"],
                self._model.spec,
                beta=preference.beta,
                tokens=pairs.mean_tokens,
                folder=samples.folder,
            )

    def _rewards(self, phase: str, pairs: PairRows) -> dict[str, float]:
        """Margins and accuracy of the round's rewards after it, on some pairs of its slice."""
        evaluate = make_evaluation(self._model.spec, self._pair_objective)
        plan = make_plan(
            pairs.positions[:_REWARD_PAIRS],
            seed=0,
            batch_size=self._align.batch_size,
            batching="bucket",
            max_length=pairs.longest(self._corpus.max_length),
            answers=pairs.answers[:_REWARD_PAIRS],
            together=rows_together(self._align.batch_size, 1, self._mesh),
        )
        total: Any = None
        batches = placed_batches(plan, pairs.collate, start=0, stop=len(plan(0)), mesh=self._mesh)
        for batch in batches:
            terms = evaluate(self._trainer.state, self._trainer.frozen, batch)
            total = terms if total is None else jax.tree.map(lambda a, b: a + b, total, terms)
        figures = {name: float(batch_mean(term)) for name, term in total.items()}
        if self._align.preference.loss == "dpo" and abs(figures["preference"] - LN_2) < 1e-5:
            self._trainer.console.say(
                f"WARNING: after {phase} the DPO loss is still ln 2: the proxy did not move away "
                "from its reference. Look at the learning rate and at the reference."
            )
        names = ("reward_margin", "reward_accuracy", "reward_chosen", "reward_rejected")
        return {f"after/{name}": figures[name] for name in (*names, "preference")}


def _round_name(round_index: int) -> str:
    return f"round_{round_index:02d}"
