"""The rules that turn a run's figures into words: what it shows, and what to try next.

They are functions of plain values; ``first_screen.py`` takes these from a run. The advice follows
docs/method.md and docs/results.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from proxykd_jax.reporting.blocks import shown

Outcome = Literal["better", "worse", "mixed", "not told apart"]
# (name in the summary, name on the page, unit, whether a higher value is better)
MEASURES = (
    ("nll", "NLL", " nats a token", False),
    ("agreement", "top-1 agreement", "", True),
    ("kl", "KL to the teacher", " nats a token", False),
)
# With fewer rows the standard errors are too rough to judge by.
FEWEST_ROWS = 5
# Answers that must have had room to end before their missing end is a finding.
FEWEST_ANSWERS = 4
# Validation that still falls by less than this share of its value counts as flat.
_FLAT = 0.002


@dataclass(frozen=True)
class Finding:
    """A comparison of the student, or of the proxy, in words.

    Attributes:
      outcome: of all measures together.
      headline, detail: what was found, and the figures that bear it.
      judged: whether there were enough rows to judge by.
    """

    outcome: Outcome
    headline: str
    detail: str
    judged: bool = True


def half_width(error: float, rows: int) -> float:
    """Half of a 95 % interval, by Student's t with ``rows - 1`` degrees of freedom.

    The quantile is the expansion of Abramowitz and Stegun, 26.7.5, to the third order; from 4
    degrees of freedom its error is below 1 %.
    """
    z, freedom = 1.959964, rows - 1
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return (z + first / freedom + second / freedom**2 + third / freedom**3) * error


def outcome_of(
    difference: float, error: float | None, rows: int, *, higher_is_better: bool
) -> Outcome:
    """Whether a difference is told apart from zero with 95 % confidence, and in which direction.

    Args:
      difference: of the means.
      error: its standard error; None if unknown.
      rows: number of rows that it comes from.
      higher_is_better: as agreement, unlike NLL.
    """
    if error is None or not math.isfinite(difference + error) or rows < FEWEST_ROWS:
        return "not told apart"
    if abs(difference) <= half_width(error, rows):
        return "not told apart"
    return "better" if (difference > 0) == higher_is_better else "worse"


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """The outcome of several measures: mixed if one is better and another worse."""
    told = {outcome for outcome in outcomes if outcome != "not told apart"}
    if not told:
        return "not told apart"
    return told.pop() if len(told) == 1 else "mixed"


def compared(
    who: str, other: str, differences: Mapping[str, Mapping[str, Any]], *, rows: int, split: str,
    paired: bool = True,
) -> Finding | None:  # fmt: skip
    """The finding of a comparison; None if nothing was measured.

    Args:
      who, other: what is compared with what, for a sentence.
      differences: measure -> ``{token_mean, token_se}``, ``who`` minus ``other``.
      rows, split: number and split of the rows.
      paired: whether both were measured on the same rows.
    """
    outcomes, parts = [], []
    for name, called, unit, higher in MEASURES:
        found = differences.get(name)
        if found is None or found.get("token_mean") is None:
            continue
        value, error = float(found["token_mean"]), found.get("token_se")
        outcome = outcome_of(value, error, rows, higher_is_better=higher)
        outcomes.append(outcome)
        sign = "+" if value > 0 else ""
        spread = ""
        if error is not None and rows > 1:
            spread = f" ± {shown(half_width(error, rows), 4)}"
        parts.append(f"{called} {outcome} ({sign}{shown(value, 4)}{spread}{unit})")
    if not parts:
        return None
    whole = together(outcomes)
    words = {
        "better": f"{who} is better than {other}.",
        "worse": f"{who} is worse than {other}.",
        "not told apart": f"{who} is not told apart from {other}.",
        "mixed": f"{who} is better than {other} by one measure and worse by another.",
    }
    about = f"{rows:,} {split} rows" + ("" if paired else ", not paired")
    if rows < FEWEST_ROWS:
        about += ", too few to judge by"
    detail = f"{'; '.join(parts)}; {about}."
    return Finding(whole, words[whole], detail, judged=rows >= FEWEST_ROWS)


@dataclass(frozen=True)
class Facts:
    """What the advice depends on.

    Attributes:
      run: path of the run, for commands.
      method: name of the student's method.
      measured: whether evaluate has measured the student.
      exported: whether the student is exported.
      uses_proxy: whether the student learns from the proxy.
      plain_known: whether a run of plain fine-tuning is compared with.
      before, proxy: outcomes of the student against itself before training and against the proxy.
      aligned: outcome of the aligned proxy against the raw one.
      proxy_against_plain: outcome of the aligned proxy against the plainly fine-tuned student.
      alpha, epochs, max_steps, steps: ``distill.alpha``, ``.epochs``, ``.max_steps``; steps taken.
      student_nll, proxy_nll: validation NLL in the course of training.
      ended: (whose answers, how many ended, how many had room to).
      empty, answers: how many of the student's held-out answers are empty, and their number.
    """

    run: str
    method: str = "proxy_kd"
    measured: bool = True
    exported: bool = False
    uses_proxy: bool = True
    plain_known: bool = False
    before: Outcome | None = None
    proxy: Outcome | None = None
    aligned: Outcome | None = None
    proxy_against_plain: Outcome | None = None
    alpha: float | None = None
    epochs: int | None = None
    max_steps: int | None = None
    steps: int | None = None
    student_nll: Sequence[float] = ()
    proxy_nll: Sequence[float] = ()
    ended: Sequence[tuple[str, int, int]] = ()
    empty: int = 0
    answers: int = 0


Advice = tuple[str, str]  # a sentence, and a command or ""


def advice(facts: Facts) -> list[Advice]:
    """What to try next; the rules that apply, the most urgent first."""
    rules = (_measure, _end_tokens, _empty, _worse, _alpha, _longer, _align_longer, _plain, _chat)
    return [found for rule in rules if (found := rule(facts)) is not None]


def _measure(facts: Facts) -> Advice | None:
    if facts.measured:
        return None
    return "The student is not measured yet.", f"proxykd evaluate --config {facts.run}/config.yaml"


def _end_tokens(facts: Facts) -> Advice | None:
    endless = [who for who, ended, room in facts.ended if not ended and room >= FEWEST_ANSWERS]
    if not endless:
        return None
    return f"No answer ended ({', '.join(endless)}): look at corpus.end_tokens.", ""


def _empty(facts: Facts) -> Advice | None:
    if facts.answers < FEWEST_ANSWERS or 2 * facts.empty < facts.answers:
        return None
    return (
        f"{facts.empty} of the student's {facts.answers} greedy answers are empty: read them, "
        "train longer, and look for empty answers among the teacher's.",
        "",
    )


def _worse(facts: Facts) -> Advice | None:
    if facts.before != "worse":
        return None
    return (
        "Training made the student worse: lower distill.optimizer.learning_rate, and export the "
        "best state (export.state: best).",
        "",
    )


def _alpha(facts: Facts) -> Advice | None:
    if not facts.uses_proxy:
        return None
    now = "" if facts.alpha is None else f" (now {facts.alpha:g})"
    if facts.proxy_against_plain in ("worse", "not told apart"):
        return (
            "The aligned proxy is not ahead of plain fine-tuning, so it has nothing to add: lower "
            f"distill.alpha{now}, collect more answers, or take a stronger proxy.",
            "",
        )
    if facts.proxy == "better":
        return (
            "The proxy is behind its student and holds it back: lower distill.alpha"
            f"{now}, or collect more answers, so that the proxy is aligned better.",
            "",
        )
    if facts.proxy == "not told apart" and facts.proxy_against_plain is None:
        return (
            "The student is as near to the teacher as its proxy, as far as these rows tell. The "
            "proxy may hold it back: collect more answers, so that the proxy is aligned better. If "
            f"plain fine-tuning is as good, lower distill.alpha{now}.",
            "",
        )
    return None


def still_falling(nll: Sequence[float]) -> bool:
    """Whether the last validation is the best by more than noise of the last digits."""
    if len(nll) < 3:
        return False
    return nll[-1] < min(nll[:-1]) * (1 - _FLAT)


def _longer(facts: Facts) -> Advice | None:
    if not still_falling(facts.student_nll):
        return None
    key, now = "distill.epochs", facts.epochs
    if facts.max_steps is not None and facts.steps == facts.max_steps:
        key, now = "distill.max_steps", facts.max_steps
    value = "" if now is None else f" (now {now})"
    return (
        f"The student's validation NLL was still falling at the end: raise {key}{value} in a new "
        "run.",
        "",
    )


def _align_longer(facts: Facts) -> Advice | None:
    if not facts.uses_proxy:
        return None
    if facts.aligned == "worse":
        return (
            "Alignment made the proxy worse: lower align.optimizer.learning_rate, or set "
            "align.alignment: nll to leave out the preference loss.",
            "",
        )
    if not still_falling(facts.proxy_nll):
        return None
    return (
        "The proxy's validation NLL was still falling at the end: raise align.num_rounds or "
        "align.epochs_per_round in a new run.",
        "",
    )


def _plain(facts: Facts) -> Advice | None:
    if not (facts.measured and facts.uses_proxy) or facts.plain_known:
        return None
    # Without the KL Proxy-KD is plain fine-tuning, and every other key may stay.
    change = "distill.alpha=0" if facts.method == "proxy_kd" else "method.name=black_box_kd"
    return (
        "Whether the proxy helps shows only beside plain fine-tuning. Train that, and compare the "
        f"two: proxykd report --run {facts.run} OTHER --out compared.html.",
        f"proxykd run --config {facts.run}/config.yaml --set name=plain --set {change}",
    )


def _chat(facts: Facts) -> Advice | None:
    if facts.before not in ("better", "mixed"):
        return None
    folder = f"{facts.run}/export/student"
    if not facts.exported:
        return "Export the student.", f"proxykd export --config {facts.run}/config.yaml"
    return "Talk to the exported student:", f"proxykd chat --model {folder}"
