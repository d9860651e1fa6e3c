"""The names of methods and states in the tables, and Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.paper_tables import proxies as px
from benchmarks.paper_tables.methods import METHODS

STATE_LABELS = {
    px.RAW: "unaligned",
    px.WARMUP: "warm-up only",
    px.NLL: "+ L_NLL",
    px.PREFERENCE: "+ L_NLL + L_Pref",
}


def label_of(name: str) -> str:
    """The name of a method for people."""
    if name in METHODS:
        return METHODS[name][0]
    if "/" in name:
        prefix, method = name.split("/", 1)
        if method in METHODS:
            return f"{prefix}: {METHODS[method][0]}"
        return f"{prefix}, {STATE_LABELS.get(method, method)}"
    return {"student": "student, pre-trained", "teacher": "teacher"}.get(name, name)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
