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
from proxykd_jax.training.batches import phase_seed
from proxykd_jax.training.objectives import AlignObjective, NllObjective
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
    config, spec = setting.config.align, setting.proxy
    validation = stacked_rows([seed.splits["validation"].batch for seed in data])
    warm = Run.start(spec, setting.align_optimizer, raw_S, validation)
    nll = NllObjective(config.reduction, config.nll_weight)
    pools = [seed.splits["warmup"].batch for seed in data]
    _nll_phase(warm, setting, nll, pools, seeds, "warmup", config.warmup_max_steps)
    best, last = {RAW: raw_S, WARMUP: warm.best}, {RAW: raw_S, WARMUP: warm.last}
    slices = [
        _slices(setting, seed, len(it.splits["align"].rows))
        for seed, it in zip(seeds, data, strict=True)
    ]
    seconds: dict[str, list[float]] = {"train_nll": [], "sample": [], "train_preference": []}
    run = warm.copy()
    for index in range(config.num_rounds):
        started = time.perf_counter()
        pools = [_part(it, cut[index]).batch for it, cut in zip(data, slices, strict=True)]
        _nll_phase(run, setting, nll, pools, seeds, round_name(index), config.round_max_steps)
        seconds["train_nll"].append(time.perf_counter() - started)
    best[NLL], last[NLL] = run.best, run.last
    run = warm.copy()
    for index in range(config.num_rounds):
        rows = [_part(it, cut[index]) for it, cut in zip(data, slices, strict=True)]
        started = time.perf_counter()
        pairs = make_pairs(spec.config, run.last, rows, seeds=seeds, salt=index + 1)
        pairs = with_references(spec, run.last, pairs)
        seconds["sample"].append(time.perf_counter() - started)
        started = time.perf_counter()
        pair_phase(
            run,
            AlignObjective.of(config),
            pairs,
            [
                _plan(setting, len(r.rows), seed, round_name(index), config.round_max_steps)
                for r, seed in zip(rows, seeds, strict=True)
            ],
            every=config.stop.every,
        )
        seconds["train_preference"].append(time.perf_counter() - started)
    best[PREFERENCE], last[PREFERENCE] = run.best, run.last
    return Proxies(best, last, seconds)


def round_name(index: int) -> str:
    """As the product names its rounds, from 1 on."""
    return f"round_{index + 1:02d}"


def _slices(setting: Setting, seed: int, count: int) -> list[np.ndarray]:
    order = permutation(count, seed=phase_seed(seed, "slices"), epoch=0)
    return np.array_split(order, setting.config.align.num_rounds)


def _part(seed: Seed, places: np.ndarray) -> Rows:
    rows = seed.splits["align"].rows
    return Rows.of([rows[place] for place in places])


def _plan(setting: Setting, count: int, seed: int, phase: str, steps: int | None) -> np.ndarray:
    assert steps is not None
    return plan_rows(count, setting.config.align, seed, f"align/{phase}", steps)


def _nll_phase(
    run: Run,
    setting: Setting,
    objective: NllObjective,
    pools: Sequence[Any],
    seeds: Sequence[int],
    phase: str,
    steps: int | None,
) -> None:
    plans = [
        _plan(setting, pool.tokens_BL.shape[0] - 1, seed, phase, steps)
        for pool, seed in zip(pools, seeds, strict=True)
    ]
    every = setting.config.align.stop.every
    run.train(objective, planned(pools, plans), len(plans[0]), every=every)


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
        return pair_logps(params, None, pairs, spec=spec, microbatches=1)

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
