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
MANY_ERRORS = 3.0  # a difference of more standard errors than this counts
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
        """With a plus where positive."""
        return ("+" if self.mean >= 0 else "") + str(self)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the mean lies with a confidence of 95 %, by Student's t; None for one seed."""
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
    """Of one value a seed."""
    n = len(values)
    error = None if n < 2 else float(values.std(ddof=1) / math.sqrt(n))
    return Estimate(float(values.mean()), error, n)


class Results:
    """The records of one regime and preset, to be asked by method, checkpoint and metric."""

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
        """All that were measured, in the order of the records."""
        return list(dict.fromkeys(method for method, _, _ in self._values))

    def checkpoints(self, method: str, metric: str) -> list[str]:
        """Of which a metric of a method is known."""
        return [c for name, c, its in self._values if name == method and its == metric]

    def values(self, method: str, checkpoint: str, metric: str) -> dict[int, float]:
        """Value by seed.

        Raises:
          KeyError: it was not measured.
        """
        return self._values[(method, checkpoint, metric)]

    def mean(self, method: str, checkpoint: str, metric: str) -> Estimate:
        """Over seeds."""
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
    """A method minus another, which may be of other results, paired by seed.

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
      text: what is claimed.
      better, worse: methods.
      metrics: a verdict each.
      source: where the paper says so, or that it does not.
    """

    text: str
    better: str
    worse: str
    metrics: tuple[str, ...] = (ACCURACY, KL)
    source: str = "paper"


def verdict(results: Results, claim: Claim, metric: str) -> str:
    """``holds`` where the paired mean difference exceeds three of its standard errors in the
    claimed direction at the best and at the last checkpoint, ``reversed`` where it does so in the
    other direction at both, else ``within noise``; of fewer than three seeds ``too few seeds``.
    """
    found = [results.difference(claim.better, claim.worse, c, metric) for c in CHECKPOINTS]
    return verdict_of(found, metric)


def verdict_of(differences: Sequence[Estimate], metric: str) -> str:
    """``verdict`` on differences, better minus worse, one a checkpoint rule."""
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


def _claims() -> tuple[Claim, ...]:
    white_box = {
        "fkl_unaligned": "forward KL from the unaligned proxy",
        "minillm": "MiniLLM",
        "gkd": "GKD",
    }
    rest = {
        "fkl_aligned": "forward KL from the aligned proxy",
        "takd_raw": "TAKD (raw assistant)",
        "takd_finetuned": "TAKD (fine-tuned assistant)",
        "mentor_kd": "Mentor-KD",
    }
    ablations = {
        "without_alignment_raw": "the same without alignment (raw proxy)",
        "without_alignment_warmup": "the same without alignment (warmed-up proxy)",
        "without_preference": "the same without the preference loss",
        "without_weights": "the same without weights",
    }
    raw, sft, aligned = (f"proxy/{state}" for state in ("raw", "nll", "nll_preference"))
    table_1, table_2 = "Table 1", "Table 2"
    not_in_paper = "not in the paper"
    return (
        Claim("Proxy-KD > black-box KD on D_s", "proxy_kd", "black_box_kd", source=table_1),
        Claim(
            "Proxy-KD > black-box KD on all of D (equal teacher budget)",
            "proxy_kd",
            "black_box_kd_all",
            source=not_in_paper,
        ),
        *(
            Claim(f"black-box KD > {label}", "black_box_kd", name, source=table_1)
            for name, label in white_box.items()
        ),
        Claim("black-box KD > TAKD (raw)", "black_box_kd", "takd_raw", source="section 5.1"),
        Claim(
            "black-box KD > TAKD (fine-tuned)",
            "black_box_kd",
            "takd_finetuned",
            source="section 5.1",
        ),
        *(
            Claim(f"Proxy-KD > {label}", "proxy_kd", name, source=table_1)
            for name, label in {**white_box, **rest}.items()
        ),
        *(
            Claim(f"Proxy-KD > {label}", "proxy_kd", name, source=table_2)
            for name, label in ablations.items()
        ),
        Claim(
            "black-box KD > Proxy-KD without alignment (raw)",
            "black_box_kd",
            "without_alignment_raw",
            source=table_2,
        ),
        Claim("alignment by NLL brings the proxy nearer", sft, raw, (KL,), "Table 4"),
        Claim("the preference loss brings it nearer still", aligned, sft, (KL,), "Table 4"),
        Claim("alignment raises top-1 agreement", aligned, raw, (AGREEMENT,), "Fig. 5"),
        Claim(
            "Proxy-KD on all of D > black-box KD on all of D",
            "proxy_kd_all",
            "black_box_kd_all",
            source=not_in_paper,
        ),
        Claim(
            "Proxy-KD on D_s and fresh prompts > Proxy-KD",
            "proxy_kd_fresh",
            "proxy_kd",
            source=not_in_paper,
        ),
        Claim(
            "half of the steps on own answers > Proxy-KD",
            "proxy_kd_mix",
            "proxy_kd",
            source=not_in_paper,
        ),
        *(
            Claim(f"{label} > black-box KD on D_s", name, "black_box_kd", source=not_in_paper)
            for name, label in {"soda": "SODA", "gad": "GAD"}.items()
        ),
        Claim(
            "on-policy reverse KL from the aligned proxy > Proxy-KD",
            "on_policy",
            "proxy_kd",
            source=not_in_paper,
        ),
        Claim(
            "drawn soft labels > the most probable ones",
            "random_labels",
            "proxy_kd",
            source=not_in_paper,
        ),
        Claim(
            "the teacher's true logits > Proxy-KD (the ceiling)",
            "teacher_logits",
            "proxy_kd",
            source=not_in_paper,
        ),
    )


CLAIMS = _claims()


def verdicts(results: Results, claims: Iterable[Claim] = CLAIMS) -> list[tuple[Claim, str, str]]:
    """(claim, metric, verdict) of all claims whose two sides were measured."""
    return [
        (claim, metric, verdict(results, claim, metric))
        for claim in claims
        for metric in claim.metrics
        if results.has(claim.better, metric) and results.has(claim.worse, metric)
    ]
