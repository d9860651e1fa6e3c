"""One change at a time, on the data and pre-trained models of a study.

A changed student or proxy is recorded as ``sweep <change>/<method or state>`` and compared with the
same method or state without the change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.metrics import SWEEP, Record
from benchmarks.paper_tables.study import Study


@dataclass(frozen=True)
class Change:
    """What is other than in the study.

    Attributes:
      overrides: of the product's config, as ``--set`` takes them.
      sizes: fields of ``Sizes``.
      students: methods that are trained under it.
    """

    overrides: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    students: tuple[str, ...] = (m.PROXY_KD,)


def _set(*overrides: str) -> Change:
    return Change(overrides)


BUDGET = (m.PROXY_KD, m.BLACK_BOX_ALL)
# By preset: what its students learn with, one change of it at a time.
STUDENT: dict[str, dict[str, Change]] = {
    "paper": {
        "alpha 1": _set("distill.alpha=1"),
        "alpha 3": _set("distill.alpha=3"),
        "alpha 10": _set("distill.alpha=10"),
        "weights of mean 1": _set("distill.weights.normalize=true"),
        "weights of token means": _set("distill.weights.loglik=token_mean"),
        "weights of token means, mean 1": _set(
            "distill.weights.loglik=token_mean", "distill.weights.normalize=true"
        ),
        "tail bucket": _set("distill.tail=bucket"),
        "top 3, renormalised": _set("score.top_k=3"),
        "top 3, tail bucket": _set("score.top_k=3", "distill.tail=bucket"),
        "rate 1e-3": _set("distill.optimizer.learning_rate=1e-3"),
        "corpus of 733": Change((), {"num_corpus": 733}, (m.BLACK_BOX, *BUDGET)),
        "corpus of 4,400": Change((), {"num_corpus": 4400}, (m.BLACK_BOX, *BUDGET)),
    },
    "recommended": {
        "alpha 1": _set("distill.alpha=1"),
        "alpha 3": _set("distill.alpha=3"),
        "alpha 100": _set("distill.alpha=100"),
        "weights as printed": _set("distill.weights.loglik=sum", "distill.weights.normalize=false"),
        "no weights": _set("distill.weights.enabled=false"),
        "tail renormalised": _set("distill.tail=renormalize_proxy"),
        "top 3": _set("score.top_k=3"),
        "top 3, renormalised": _set("score.top_k=3", "distill.tail=renormalize_proxy"),
        "80 % of D for alignment": _set("corpus.shares={warmup: 0.1, align: 0.8, distill: 0.1}"),
        "1,600 steps": Change(("distill.max_steps=1600",), {}, (*BUDGET, "proxy_kd_mix")),
        "1,600 steps, 5,000 fresh prompts": Change(
            ("distill.max_steps=1600",), {"num_fresh": 5000}, (m.PROXY_KD, "proxy_kd_mix")
        ),
    },
}
# Of the proxy; the students of the preset "paper" show what a change of it is worth to them.
PROXY: dict[str, Change] = {
    "beta 0.1": _set("align.preference.beta=0.1"),
    "beta 5": _set("align.preference.beta=5"),
    "1 round": _set("align.num_rounds=1", "align.round_max_steps=160"),
    "16 rounds": _set("align.num_rounds=16", "align.round_max_steps=10", "align.stop.every=10"),
    "IPO": _set("align.preference.loss=ipo", "align.preference.beta=0.5"),
    "SimPO": _set("align.preference.loss=simpo", "align.preference.beta=2"),
    "ORPO": _set("align.preference.loss=orpo", "align.preference.beta=0.1"),
    "DPO alone": _set("align.nll_weight=0"),
}
# The last checkpoint is the point here: twelve rounds at a high rate, never stopped.
OVERTRAINED = _set("align.num_rounds=12", "align.optimizer.learning_rate=1e-3")


def records(study: Study) -> list[Record]:
    """All changes that fit the study's preset."""
    return [record for part in _parts(study) for record in part]


def _parts(study: Study) -> Iterator[list[Record]]:
    preset = study.setting.preset
    for name, change in STUDENT[preset].items():
        changed = _changed(study, change)
        yield changed.student_records(change.students, prefix=f"{SWEEP}{name}/")
    if preset != "paper":
        return
    for name, change in PROXY.items():
        changed = _changed(study, change)
        yield changed.proxy_records(SWEEP + name, states=(px.PREFERENCE,))
        yield changed.student_records(change.students, prefix=f"{SWEEP}{name}/")
    overtrained = _changed(study, OVERTRAINED)
    yield overtrained.proxy_records(f"{SWEEP}overtrained", states=(px.NLL, px.PREFERENCE))


def _changed(study: Study, change: Change) -> Study:
    sizes = study.setting.sizes
    overrides = (*sizes.overrides, *change.overrides)
    return study.with_changes(sizes=dataclasses.replace(sizes, **change.sizes, overrides=overrides))
