"""Makes one change at a time, on the data and pre-trained models of a study.

A changed student or proxy is recorded as ``sweep <change>/<method or state>`` and compared with the
same method or state without the change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.metrics import SWEEP, Record
from benchmarks.paper_tables.study import Study


@dataclass(frozen=True)
class Change:
    """A difference from the study.

    Attributes:
      overrides: keys of the product's config, as ``--set`` takes them.
      sizes: fields of ``Sizes``.
      students: the methods that are trained with it.
      states: the states of the proxy that are measured with it.
    """

    overrides: tuple[str, ...] = ()
    sizes: dict[str, Any] = field(default_factory=dict)
    students: tuple[str, ...] = (m.PROXY_KD,)
    states: tuple[str, ...] = ()


def _set(*overrides: str) -> Change:
    return Change(overrides)


def _proxy(*overrides: str) -> Change:
    """A change of the alignment: both the proxy and its student are measured."""
    return Change(overrides, states=(px.PREFERENCE,))


BUDGET = (m.PROXY_KD, m.BLACK_BOX_ALL)
# The changes by preset and name; each is compared with the preset as it is.
CHANGES: dict[str, dict[str, Change]] = {
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
        "beta 0.1": _proxy("align.preference.beta=0.1"),
        "beta 5": _proxy("align.preference.beta=5"),
        "1 round": _proxy("align.num_rounds=1", "align.round_max_steps=160"),
        "16 rounds": _proxy(
            "align.num_rounds=16", "align.round_max_steps=10", "align.stop.every=10"
        ),
        "IPO": _proxy("align.preference.loss=ipo", "align.preference.beta=0.5"),
        "SimPO": _proxy("align.preference.loss=simpo", "align.preference.beta=2"),
        "ORPO": _proxy("align.preference.loss=orpo", "align.preference.beta=0.1"),
        "DPO alone": _proxy("align.nll_weight=0"),
        # Twelve rounds at a high rate, without a stop, show what becomes of the last checkpoint.
        "overtrained": Change(
            ("align.num_rounds=12", "align.optimizer.learning_rate=1e-3"),
            students=(),
            states=(px.NLL, px.PREFERENCE),
        ),
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
        "four times the alignment": Change(
            ("align.round_max_steps=160",),
            students=(m.PROXY_KD, "without_preference"),
            states=(px.NLL, px.PREFERENCE),
        ),
        "no clipping": _proxy("align.optimizer.clip_norm=null", "distill.optimizer.clip_norm=null"),
        "1,600 steps": Change(("distill.max_steps=1600",), {}, (*BUDGET, "proxy_kd_mix")),
        "1,600 steps, 5,000 fresh prompts": Change(
            ("distill.max_steps=1600",), {"num_fresh": 5000}, (m.PROXY_KD, "proxy_kd_mix")
        ),
    },
}


def all_names() -> list[str]:
    """The names of the changes of all presets."""
    return list(dict.fromkeys(name for changes in CHANGES.values() for name in changes))


def students(names: Sequence[str], presets: Sequence[str]) -> list[str]:
    """The methods that the named changes train under these presets."""
    changes = [
        CHANGES[preset][name] for preset in presets for name in CHANGES[preset] if name in names
    ]
    return list(dict.fromkeys(student for change in changes for student in change.students))


def records(study: Study, names: Sequence[str]) -> list[Record]:
    """Measures the named changes of the study's preset."""
    found: list[Record] = []
    for name, change in CHANGES[study.setting.preset].items():
        if name not in names:
            continue
        changed = _changed(study, change)
        if change.states:
            found += changed.proxy_records(SWEEP + name, states=change.states)
        found += changed.student_records(change.students, prefix=f"{SWEEP}{name}/")
    return found


def _changed(study: Study, change: Change) -> Study:
    sizes = study.setting.sizes
    overrides = (*sizes.overrides, *change.overrides)
    return study.with_changes(sizes=dataclasses.replace(sizes, **change.sizes, overrides=overrides))
