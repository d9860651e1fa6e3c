"""The proxy in its states: raw, warmed up, aligned by NLL, and by NLL and preference (eqs. 3-6)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from benchmarks.paper_tables import models
from benchmarks.paper_tables.seeds import Rows, Seed
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import Run, plan_rows, planned, stacked_rows
from benchmarks.paper_tables.vectorise import over_seeds
from proxykd_jax.data.order import permutation
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.random_keys import purpose_seed
from proxykd_jax.training.batch_objectives import AlignObjective, NllObjective
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.training.state import ModelSpec
from proxykd_jax.types import PairBatch

RAW, WARMUP, NLL, PREFERENCE = "raw", "warmup", "nll", "nll_preference"
STATES = (RAW, WARMUP, NLL, PREFERENCE)


@dataclass(frozen=True)
class Proxies:
    """Parameters of all seeds by state of the proxy.

    Attributes:
      best: with the lowest validation NLL of the stage so far, the students' proxies.
      last: after the last step.
      seconds: of a round's parts, for Table 3; nothing is compiled in them but for the first.
    """

    best: dict[str, Any]
    last: dict[str, Any]
    seconds: dict[str, list[float]]


def align(setting: Setting, data: Sequence[Seed], seeds: Sequence[int], raw_S: Any) -> Proxies:
    """All states of the proxy: NLL and NLL with preference begin at the same warm-up."""
    stage = _Alignment(setting, data, seeds)
    validation = stacked_rows([seed.splits["validation"].batch for seed in data])
    warm = Run.start(setting.proxy, setting.align_optimizer, raw_S, validation)
    warmup_rows = [seed.splits["warmup"] for seed in data]
    stage.train_nll(warm, warmup_rows, "warmup", setting.config.align.warmup_max_steps)
    by_nll, by_preference = warm.copy(), warm.copy()
    seconds = {**stage.nll_rounds(by_nll), **stage.preference_rounds(by_preference)}
    runs = {WARMUP: warm, NLL: by_nll, PREFERENCE: by_preference}
    return Proxies(
        best={RAW: raw_S, **{state: run.best for state, run in runs.items()}},
        last={RAW: raw_S, **{state: run.last for state, run in runs.items()}},
        seconds=seconds,
    )


def round_name(index: int) -> str:
    """As the product names its rounds, from 1 on."""
    return f"round_{index + 1:02d}"


@dataclass(frozen=True)
class _Alignment:
    """``training.alignment`` of all seeds."""

    setting: Setting
    data: Sequence[Seed]
    seeds: Sequence[int]

    @functools.cached_property
    def rounds(self) -> list[list[Rows]]:
        """Every seed's rows of each round: D_p cut into disjoint slices."""
        parts = []
        for seed, its in zip(self.seeds, self.data, strict=True):
            rows = its.splits["align"].rows
            order = permutation(len(rows), seed=purpose_seed(seed, "slices"), epoch=0)
            cut = np.array_split(order, self.setting.config.align.num_rounds)
            parts.append([Rows.of([rows[place] for place in places]) for places in cut])
        return [list(rows_S) for rows_S in zip(*parts, strict=True)]

    def train_nll(self, run: Run, rows_S: Sequence[Rows], phase: str, steps: int | None) -> None:
        """NLL of the teacher's answers."""
        config = self.setting.config.align
        objective = NllObjective(config.reduction, config.nll_weight)
        plans = self._plans(rows_S, phase, steps)
        batches = planned([rows.batch for rows in rows_S], plans)
        run.train(objective, batches, len(plans[0]), every=config.stop.every)

    def nll_rounds(self, run: Run) -> dict[str, list[float]]:
        """All rounds by NLL alone; seconds of each."""
        seconds = []
        for index, rows_S in enumerate(self.rounds):
            started = time.perf_counter()
            steps = self.setting.config.align.round_max_steps
            self.train_nll(run, rows_S, round_name(index), steps)
            seconds.append(time.perf_counter() - started)
        return {"train_nll": seconds}

    def preference_rounds(self, run: Run) -> dict[str, list[float]]:
        """All rounds by NLL and preference; seconds of each one's sampling and training."""
        config, spec = self.setting.config.align, self.setting.proxy
        seconds: dict[str, list[float]] = {"sample": [], "train_preference": []}
        for index, rows_S in enumerate(self.rounds):
            started = time.perf_counter()
            pairs = make_pairs(spec.config, run.last, rows_S, seeds=self.seeds, salt=index + 1)
            pairs = with_references(spec, run.last, pairs)
            sampled = time.perf_counter()
            plans = self._plans(rows_S, round_name(index), config.round_max_steps)
            pair_phase(run, AlignObjective.of(config), pairs, plans, every=config.stop.every)
            seconds["sample"].append(sampled - started)
            seconds["train_preference"].append(time.perf_counter() - sampled)
        return seconds

    def _plans(self, rows_S: Sequence[Rows], phase: str, steps: int | None) -> list[np.ndarray]:
        assert steps is not None
        config = self.setting.config.align
        return [
            plan_rows(len(rows.rows), config, seed, f"align/{phase}", steps)
            for rows, seed in zip(rows_S, self.seeds, strict=True)
        ]


def make_pairs(
    model: ModelConfig, params_S: Any, rows_S: Sequence[Rows], *, seeds: Sequence[int], salt: int
) -> list[PairBatch]:
    """The teacher's answers beside the model's own, without reference log-probs.

    An own answer that equals the teacher's is no pair, as in the product.
    """
    prompts = [rows.prompts_NP for rows in rows_S]
    ids = [rows.ids for rows in rows_S]
    drawn = models.answer(model, params_S, prompts, ids, seeds=seeds, salt=salt)
    pairs = []
    for rows, own in zip(rows_S, models.answered_rows(prompts, drawn), strict=True):
        usable = [
            not np.array_equal(a.tokens, b.tokens) for a, b in zip(rows.rows, own.rows, strict=True)
        ]
        zeros = np.zeros(len(usable) + 1, np.float32)
        pairs.append(PairBatch(rows.batch, own.batch, zeros, zeros, np.array([*usable, False])))
    return pairs


def with_references(spec: ModelSpec, params_S: Any, pairs: Sequence[PairBatch]) -> list[PairBatch]:
    """The pairs with log pi_ref of these parameters."""
    compute = _references(spec)
    parts = [
        [np.asarray(x) for x in compute(params_S, part)] for part in models.chunks(list(pairs))
    ]
    referenced = []
    for i, pair in enumerate(pairs):
        size = len(pair.pair_mask_B)
        chosen, rejected = (np.concatenate([p[k][i] for p in parts])[:size] for k in (0, 1))
        referenced.append(pair.replace(reference_chosen_B=chosen, reference_rejected_B=rejected))
    return referenced


@functools.lru_cache(maxsize=8)
def _references(spec: ModelSpec) -> Callable[..., Any]:
    def logps(params: Any, pairs: PairBatch) -> tuple[jax.Array, jax.Array]:
        return pair_logps({}, params, pairs, spec=spec, microbatches=1)

    return over_seeds(logps)


def pair_phase(
    run: Run,
    objective: AlignObjective,
    pairs: Sequence[PairBatch],
    plans: Sequence[np.ndarray],
    *,
    every: int,
    **options: Any,
) -> None:
    """A round on pairs."""
    run.train(objective, planned(pairs, plans), len(plans[0]), every=every, **options)
