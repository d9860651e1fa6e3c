"""Means with standard errors over seeds, differences paired by seed, and verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.paper_tables.metrics import (
    ACCURACY,
    AGREEMENT,
    BEST,
    EITHER_PRESET,
    KL,
    LAST,
    TEACHER_NLL,
    Record,
)

CHECKPOINTS = (BEST, LAST)
HIGHER_IS_BETTER = {ACCURACY: True, AGREEMENT: True, KL: False, TEACHER_NLL: False}
HOLDS, WITHIN_NOISE, REVERSED, TOO_FEW = "holds", "within noise", "reversed", "too few seeds"
MANY_ERRORS = 3.0  # A difference counts if it exceeds so many standard errors.
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard error (None for one seed)."""

    mean: float
    error: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.error is None else f" ±{self.error:.3f}")

    def signed(self) -> str:
        """The text with a plus if the mean is positive."""
        return ("+" if self.mean >= 0 else "") + str(self)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The confidence interval of 95 % by Student's t; None for one seed."""
        if self.error is None:
            return None
        from scipy.stats import t

        half = float(t.ppf(0.975, self.n - 1)) * self.error
        return self.mean - half, self.mean + half

    def with_interval(self) -> str:
        """``signed`` and the interval."""
        if self.interval is None:
            return self.signed()
        low, high = self.interval
        return f"{self.signed()} [{low:+.3f}, {high:+.3f}]"


def estimate(values: np.ndarray) -> Estimate:
    """The estimate from one value per seed."""
    n = len(values)
    error = None if n < 2 else float(values.std(ddof=1) / math.sqrt(n))
    return Estimate(float(values.mean()), error, n)


class Results:
    """The records of one regime and preset, by method, checkpoint and metric."""

    def __init__(self, records: Iterable[Record], regime: str, preset: str) -> None:
        self.regime, self.preset = regime, preset
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        for record in records:
            if record.regime == regime and record.preset in (preset, EITHER_PRESET):
                key = (record.method, record.checkpoint, record.metric)
                self._values.setdefault(key, {})[record.seed] = record.value

    def has(self, method: str, metric: str = KL) -> bool:
        """Whether a method was measured."""
        return all((method, checkpoint, metric) in self._values for checkpoint in CHECKPOINTS)

    def methods(self) -> list[str]:
        """All measured methods, in the order of the records."""
        return list(dict.fromkeys(method for method, _, _ in self._values))

    def checkpoints(self, method: str, metric: str) -> list[str]:
        """The checkpoints at which a metric of a method is known."""
        return [c for name, c, its in self._values if name == method and its == metric]

    def values(self, method: str, checkpoint: str, metric: str) -> dict[int, float]:
        """The value of each seed.

        Raises:
          KeyError: it was not measured.
        """
        return self._values[(method, checkpoint, metric)]

    def mean(self, method: str, checkpoint: str, metric: str) -> Estimate:
        """The mean over seeds."""
        return estimate(np.array(list(self.values(method, checkpoint, metric).values())))

    def difference(self, first: str, second: str, checkpoint: str, metric: str) -> Estimate:
        """``first`` minus ``second``, paired by seed.

        Raises:
          ValueError: the two were not measured on the same seeds.
        """
        return difference_between((self, first), (self, second), checkpoint, metric)


def difference_between(
    first: tuple[Results, str], second: tuple[Results, str], checkpoint: str, metric: str
) -> Estimate:
    """A method minus another, which may belong to other results, paired by seed.

    Raises:
      ValueError: the two were not measured on the same seeds.
    """
    one, other = (its.values(name, checkpoint, metric) for its, name in (first, second))
    if set(one) != set(other):
        raise ValueError(f"{first[1]} and {second[1]} were not measured on the same seeds")
    return estimate(np.array([one[seed] - other[seed] for seed in one]))


@dataclass(frozen=True)
class Claim:
    """``better`` is better than ``worse`` in each of the metrics.

    Attributes:
      text: the claim in words.
      better, worse: methods.
      source: where the paper makes the claim, or that it does not.
      metrics: the metrics that each have a verdict.
    """

    text: str
    better: str
    worse: str
    source: str = "paper"
    metrics: tuple[str, ...] = (ACCURACY, KL)


def verdict(results: Results, claim: Claim, metric: str) -> str:
    """Says whether a claim holds.

    It ``holds`` if the paired mean difference exceeds three of its standard errors in the claimed
    direction, at the best and at the last checkpoint. It is ``reversed`` if the difference does so
    in the other direction at both. Otherwise it is ``within noise``. Fewer than three seeds are
    ``too few seeds``.
    """
    found = [results.difference(claim.better, claim.worse, c, metric) for c in CHECKPOINTS]
    return verdict_of(found, metric)


def verdict_of(differences: Sequence[Estimate], metric: str) -> str:
    """``verdict`` on the differences, better minus worse, at each checkpoint."""
    sign = 1.0 if HIGHER_IS_BETTER[metric] else -1.0
    sides = []
    for found in differences:
        if found.n < FEWEST_SEEDS or found.error is None:
            return TOO_FEW
        beyond = abs(found.mean) > MANY_ERRORS * found.error
        sides.append(math.copysign(1, sign * found.mean) if beyond else 0)
    if all(side > 0 for side in sides):
        return HOLDS
    return REVERSED if all(side < 0 for side in sides) else WITHIN_NOISE


_PROXY_KD, _BLACK_BOX, _ON_ALL = "proxy_kd", "black_box_kd", "black_box_kd_all"
_RAW, _NLL, _ALIGNED = "proxy/raw", "proxy/nll", "proxy/nll_preference"
_TABLE_1, _TABLE_2, _NOT_PAPER = "Table 1", "Table 2", "not in the paper"
_WHITE_BOX = {
    "fkl_unaligned": "forward KL from the unaligned proxy",
    "minillm": "MiniLLM",
    "gkd": "GKD",
}
_OTHERS = {
    "fkl_aligned": "forward KL from the aligned proxy",
    "takd_raw": "TAKD (raw assistant)",
    "takd_finetuned": "TAKD (fine-tuned assistant)",
    "mentor_kd": "Mentor-KD",
}
_ABLATIONS = {
    "without_alignment_raw": "the same without alignment (raw proxy)",
    "without_alignment_warmup": "the same without alignment (warmed-up proxy)",
    "without_preference": "the same without the preference loss",
    "without_weights": "the same without weights",
}
_SAME_BUDGET = "Proxy-KD > black-box KD on all of D (equal teacher budget)"
_WITHOUT = "black-box KD > Proxy-KD without alignment (raw)"
_WHOLE = "Proxy-KD on all of D > black-box KD on all of D"
_CEILING = "the teacher's true logits > Proxy-KD (the ceiling)"
_REVERSE = "on-policy reverse KL from the aligned proxy > Proxy-KD"
CLAIMS = (
    Claim("Proxy-KD > black-box KD on D_s", _PROXY_KD, _BLACK_BOX, _TABLE_1),
    Claim(_SAME_BUDGET, _PROXY_KD, _ON_ALL, _NOT_PAPER),
    *(Claim(f"black-box KD > {x}", _BLACK_BOX, name, _TABLE_1) for name, x in _WHITE_BOX.items()),
    Claim("black-box KD > TAKD (raw)", _BLACK_BOX, "takd_raw", "section 5.1"),
    Claim("black-box KD > TAKD (fine-tuned)", _BLACK_BOX, "takd_finetuned", "section 5.1"),
    *(
        Claim(f"Proxy-KD > {x}", _PROXY_KD, name, _TABLE_1)
        for name, x in {**_WHITE_BOX, **_OTHERS}.items()
    ),
    *(Claim(f"Proxy-KD > {x}", _PROXY_KD, name, _TABLE_2) for name, x in _ABLATIONS.items()),
    Claim(_WITHOUT, _BLACK_BOX, "without_alignment_raw", _TABLE_2),
    Claim("alignment by NLL brings the proxy nearer", _NLL, _RAW, "Table 4", (KL,)),
    Claim("the preference loss brings it nearer still", _ALIGNED, _NLL, "Table 4", (KL,)),
    Claim("alignment raises top-1 agreement", _ALIGNED, _RAW, "Fig. 5", (AGREEMENT,)),
    Claim(_WHOLE, "proxy_kd_all", _ON_ALL, _NOT_PAPER),
    *(
        Claim(f"{x} > Proxy-KD", name, _PROXY_KD, _NOT_PAPER)
        for name, x in {
            "proxy_kd_fresh": "Proxy-KD on D_s and fresh prompts",
            "proxy_kd_mix": "half of the steps on own answers",
        }.items()
    ),
    Claim("SODA > black-box KD on D_s", "soda", _BLACK_BOX, _NOT_PAPER),
    Claim("GAD > black-box KD on D_s", "gad", _BLACK_BOX, _NOT_PAPER),
    Claim(_REVERSE, "on_policy", _PROXY_KD, _NOT_PAPER),
    Claim("drawn soft labels > the most probable ones", "random_labels", _PROXY_KD, _NOT_PAPER),
    Claim(_CEILING, "teacher_logits", _PROXY_KD, _NOT_PAPER),
)


def verdicts(results: Results, claims: Iterable[Claim] = CLAIMS) -> list[tuple[Claim, str, str]]:
    """(claim, metric, verdict) of all claims whose two sides were measured."""
    return [
        (claim, metric, verdict(results, claim, metric))
        for claim in claims
        for metric in claim.metrics
        if results.has(claim.better, metric) and results.has(claim.worse, metric)
    ]
