"""One knob at a time, on the data and pre-trained models of a study."""

from __future__ import annotations

import dataclasses

from benchmarks.paper_tables import methods as m
from benchmarks.paper_tables.metrics import Record
from benchmarks.paper_tables.study import Study

# name -> changes of the config; of the student's section, then of the proxy's.
STUDENT: dict[str, tuple[str, ...]] = {
    "alpha 1": ("distill.alpha=1",),
    "alpha 3": ("distill.alpha=3",),
    "alpha 10": ("distill.alpha=10",),
    "weights of token means": ("distill.weights.loglik=token_mean",),
    "tail bucket": ("distill.tail=bucket",),
    "top 3, renormalised": ("score.top_k=3",),
    "top 3, tail bucket": ("score.top_k=3", "distill.tail=bucket"),
}
PROXY: dict[str, tuple[str, ...]] = {
    "beta 0.1": ("align.preference.beta=0.1",),
    "1 round": ("align.num_rounds=1", "align.round_max_steps=160"),
    "16 rounds": ("align.num_rounds=16", "align.round_max_steps=10", "align.stop.every=10"),
    # The last checkpoint is the point here: twelve rounds at a high rate, never stopped.
    "overtrained": ("align.num_rounds=12", "align.optimizer.learning_rate=1e-3"),
}


def records(study: Study) -> list[Record]:
    """Proxy-KD's student by each change of its section; every proxy by each of its own."""
    found: list[Record] = []
    for name, overrides in STUDENT.items():
        changed = _changed(study, overrides)
        found += changed.student_records([m.PROXY_KD], prefix=f"sweep {name}/")
    for name, overrides in PROXY.items():
        found += _changed(study, overrides).proxy_records(f"sweep {name}")
    return found


def _changed(study: Study, overrides: tuple[str, ...]) -> Study:
    sizes = study.setting.sizes
    return study.with_changes(
        sizes=dataclasses.replace(sizes, overrides=(*sizes.overrides, *overrides))
    )
