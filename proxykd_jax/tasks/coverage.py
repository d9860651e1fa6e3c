"""What a benchmark's files cannot measure: rows without use, and golds that no answer reaches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxykd_jax.tasks.extraction import can_be_right
from proxykd_jax.tasks.items import Questions

_MOST_NAMED = 10


def coverage(questions: Questions) -> dict[str, Any]:
    """The entry of one benchmark under ``files`` in ``summary.json``.

    Returns:
      ``items``, how many are asked; ``unusable``, the place and problem of each row that is not;
      ``unreachable``, the id and gold of each item whose gold no answer reaches. Such an item is
      asked and counts as wrong.
    """
    return {
        "items": len(questions.items),
        "unusable": questions.unusable,
        "unreachable": {item.id: item.gold for item in questions.items if not can_be_right(item)},
    }


def described_coverage(task: str, found: Mapping[str, Any]) -> list[str]:
    """The sentences about what ``coverage`` found; none if every row is asked and can be right."""
    lines = []
    if found["unusable"]:
        count = len(found["unusable"])
        lines.append(
            f"evaluate: {task}: {count} of {count + found['items']} rows cannot be used and are "
            f"not asked: {_named(found['unusable'])}"
        )
    if found["unreachable"]:
        named = [f"{name} (gold {gold})" for name, gold in found["unreachable"].items()]
        lines.append(
            f"evaluate: {task}: no answer reaches the gold of {len(named)} of {found['items']} "
            f"items, which count as wrong: {_named(named)}"
        )
    return lines


def _named(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return "; ".join(names[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
