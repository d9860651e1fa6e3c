"""Measures models on the test prompts; the evaluator knows the teacher's distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.miniature import world as w
from benchmarks.paper_tables import models
from benchmarks.paper_tables.offline import at_places
from benchmarks.paper_tables.seeds import Seed
from benchmarks.paper_tables.vectorise import filled, over_seeds
from proxykd_jax.evaluation.measures import position_measures
from proxykd_jax.models.config import ModelConfig
from proxykd_jax.types import TokenBatch

BEST, LAST = "best", "last"
ACCURACY, KL, AGREEMENT, TEACHER_NLL = "accuracy", "kl", "agreement", "nll"
EITHER_PRESET = "both"  # The preset of records that no preset changes.
SWEEP = "sweep "  # The names of changed students and proxies begin with it.
TOP_KS = (1, 2, 3, 5, 10, 20)
MAIN_METRICS = (ACCURACY, KL, AGREEMENT, TEACHER_NLL)


@dataclass(frozen=True)
class Record:
    """One line of ``tables.json``.

    Attributes:
      regime: the study's.
      preset: the study's; ``both`` where no preset changes the number.
      method: a student's, ``proxy/<state>``, ``student`` (pre-trained) or ``teacher``.
      checkpoint: ``best`` on validation NLL, ``last``, or ``step_<n>``.
      seed: the seed of everything.
      metric: ``accuracy`` (greedy, on unseen prompts), ``kl`` (teacher || model, nats a token),
        ``agreement`` (top-1, with the teacher's tokens), ``nll`` (of these tokens),
        ``top_mass_<K>``, or seconds.
      value: the number.
    """

    regime: str
    preset: str
    method: str
    checkpoint: str
    seed: int
    metric: str
    value: float

    def to_json(self) -> dict[str, Any]:
        """The line of the file."""
        return asdict(self)


@dataclass(frozen=True)
class Recorder:
    """Makes records of one regime and preset."""

    regime: str
    preset: str
    seeds: Sequence[int]

    def __call__(
        self, method: str, checkpoint: str, values: Mapping[str, Iterable[float]]
    ) -> list[Record]:
        """Makes a record of every seed's value of every metric."""
        return [
            Record(self.regime, self.preset, method, checkpoint, seed, metric, float(value))
            for metric, per_seed in values.items()
            for seed, value in zip(self.seeds, per_seed, strict=True)
        ]

    def same(self, method: str, checkpoint: str, metric: str, value: float) -> list[Record]:
        """Makes records of a value that all seeds share."""
        return self(method, checkpoint, {metric: [value] * len(self.seeds)})


class Evaluator:
    """The test rows of all seeds with the teacher's distribution on them."""

    def __init__(self, data: Sequence[Seed], seeds: Sequence[int]) -> None:
        self._data, self._seeds = data, seeds
        self._rows = filled([seed.test.batch for seed in data])
        self._logps = np.stack(
            [at_places(seed.teacher_logps_NTV, seed.test.batch.tokens_BL.shape) for seed in data]
        )

    def measure(
        self, model: ModelConfig, params_S: Any, *, masses: bool = False, distance: bool = True
    ) -> dict[str, np.ndarray]:
        """Measures a model: metric -> value of every seed.

        Args:
          model, params_S: the model.
          masses: whether the shares of Fig. 4 are measured too.
          distance: whether KL, agreement and NLL are measured; if not, only accuracy is.
        """
        values: dict[str, np.ndarray] = {}
        if distance:
            found = _figures(model, TOP_KS if masses else ())(params_S, self._rows, self._logps)
            values |= {name: np.asarray(x) for name, x in found.items()}
        correct = models.greedy_correct(model, params_S, self._data, self._seeds)
        return {ACCURACY: np.array([each.mean() for each in correct]), **values}

    def teacher(self) -> dict[str, np.ndarray]:
        """Measures the teacher on its own text: agreement, NLL and a KL of 0."""
        values: dict[str, list[float]] = {AGREEMENT: [], TEACHER_NLL: [], KL: []}
        for seed in self._data:
            answers_NT = seed.test.answers_NT
            lengths = w.answer_lengths(answers_NT)
            mask_NT = np.arange(w.MAX_ANSWER)[None, :] < lengths[:, None]
            logps = seed.teacher_logps_NTV
            said = np.take_along_axis(logps, answers_NT[..., None], axis=-1)[..., 0]
            values[TEACHER_NLL].append(float(-said[mask_NT].mean()))
            values[AGREEMENT].append(float((logps.argmax(-1) == answers_NT)[mask_NT].mean()))
            values[KL].append(0.0)
        return {name: np.array(each) for name, each in values.items()}


@functools.lru_cache(maxsize=16)
def _figures(model: ModelConfig, top_ks: tuple[int, ...]) -> Callable[..., Any]:
    def figures(params: Any, rows: TokenBatch, logps_BLV: jax.Array) -> dict[str, jax.Array]:
        found = position_measures(model, params, None, rows, logps_BLV, top_ks=top_ks)
        tokens = rows.mask_BL.sum()
        means = {
            name: jnp.where(rows.mask_BL, found[name], 0).sum() / tokens
            for name in (KL, AGREEMENT, TEACHER_NLL)
        }
        for index, top_k in enumerate(top_ks):
            held_BL = found["top_mass"][..., index]
            means[f"top_mass_{top_k}"] = jnp.where(rows.mask_BL, held_BL, False).sum() / tokens
        return means

    return over_seeds(figures)
