"""Aligns the proxies of all seeds: raw, warmed up, by NLL, and by NLL and preference (eqs. 3-6)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from benchmarks.paper_tables import models
from benchmarks.paper_tables.seeds import Rows, Seed
from benchmarks.paper_tables.settings import Setting
from benchmarks.paper_tables.training import Run, every_row
from benchmarks.paper_tables.vectorise import filled, in_chunks, over_seeds
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.training.alignment import alignment_phases
from proxykd_jax.training.pairs import collate_pairs
from proxykd_jax.training.phase import Phase
from proxykd_jax.training.reference import pair_logps
from proxykd_jax.training.state import Spec
from proxykd_jax.types import PairBatch

RAW, WARMUP, NLL, PREFERENCE = "raw", "warmup", "nll", "nll_preference"
STATES = (RAW, WARMUP, NLL, PREFERENCE)


@dataclass(frozen=True)
class Proxies:
    """The parameters of all seeds by state of the proxy.

    Attributes:
      best: with the lowest validation NLL of the stage so far; students learn from these.
      last: after the last step.
      seconds: of the parts of each round, for Table 3. The first round's include compilation.
    """

    best: dict[str, Any]
    last: dict[str, Any]
    seconds: dict[str, list[float]]


def align(setting: Setting, data: Sequence[Seed], seeds: Sequence[int], raw_S: Any) -> Proxies:
    """Makes all states of the proxy. NLL and NLL with preference start from the same warm-up."""

    def phases(alignment: str) -> list[tuple[Phase, ...]]:
        runs = [
            setting.run("align", seed, its.splits, align={"alignment": alignment})
            for seed, its in zip(seeds, data, strict=True)
        ]
        return list(zip(*map(alignment_phases, runs), strict=True))

    (warmup, *nll_rounds), (_, *preference_rounds) = phases(NLL), phases(PREFERENCE)
    validation = filled([seed.splits["validation"].batch for seed in data])
    warm = Run.start(warmup[0], setting.config.align, raw_S, validation)
    warm.take(warmup)
    by_nll, by_preference = warm.copy(), warm.copy()
    seconds: dict[str, list[float]] = {"train_nll": [], "sample": [], "train_preference": []}

    def timed(part: str, function: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = function()
        seconds[part].append(time.perf_counter() - started)
        return found

    for round_ in nll_rounds:
        timed("train_nll", functools.partial(by_nll.take, round_))
    for index, round_ in enumerate(preference_rounds, start=1):
        pairs = timed("sample", functools.partial(_pairs, setting, by_preference, round_, index))
        timed("train_preference", functools.partial(by_preference.take, round_, pools=pairs))
    runs = {WARMUP: warm, NLL: by_nll, PREFERENCE: by_preference}
    return Proxies(
        best={RAW: raw_S, **{state: run.best for state, run in runs.items()}},
        last={RAW: raw_S, **{state: run.last for state, run in runs.items()}},
        seconds=seconds,
    )


def _pairs(setting: Setting, run: Run, phases: Sequence[Phase], index: int) -> list[PairBatch]:
    """The pairs of a round, with the proxy at its beginning as the reference."""
    rows_S = [Rows(phase.rows.read(range(len(phase.rows)))) for phase in phases]
    seeds = [phase.seed for phase in phases]
    pairs = make_pairs(setting.proxy_model, run.last, rows_S, seeds=seeds, salt=index)
    return with_references(run.spec, run.last, pairs)


def make_pairs(
    model: ModelConfig, params_S: Any, rows_S: Sequence[Rows], *, seeds: Sequence[int], salt: int
) -> list[PairBatch]:
    """Makes pairs of the teacher's answers and the model's own, without reference log-probs.

    As in the product, an own answer that equals the teacher's makes no pair.
    """
    prompts = [rows.prompts_NP for rows in rows_S]
    ids = [rows.ids for rows in rows_S]
    drawn = models.answer(model, params_S, prompts, ids, seeds=seeds, salt=salt)
    pairs = []
    for rows, own in zip(rows_S, models.answered_rows(prompts, drawn), strict=True):
        both = [
            (a, None if np.array_equal(a.tokens, b.tokens) else b)
            for a, b in zip(rows.rows, own.rows, strict=True)
        ]
        nothing = np.zeros(len(both), np.float32)
        batch = collate_pairs(both, every_row(len(both)), (nothing, nothing), share_prompt=False)
        assert isinstance(batch, PairBatch)
        pairs.append(batch)
    return pairs


def with_references(spec: Spec, params_S: Any, pairs: Sequence[PairBatch]) -> list[PairBatch]:
    """The pairs with the log-probs of these parameters as the references."""
    found = in_chunks(functools.partial(_references(spec), params_S), pairs)
    return [
        replace(pair, reference_chosen_B=chosen, reference_rejected_B=rejected)
        for pair, (chosen, rejected) in zip(pairs, found, strict=True)
    ]


@functools.lru_cache(maxsize=8)
def _references(spec: Any) -> Callable[..., Any]:
    def logps(params: Any, pairs: PairBatch) -> tuple[jax.Array, jax.Array]:
        return pair_logps({}, params, pairs, spec=spec, microbatches=1)

    return over_seeds(logps)
