"""A model's answers on disk, part by part, so that a restarted run asks only for the rest.

``part_00000.jsonl`` holds one line per item: its id, the hash of its prompt, and the response. It
is written whole or not at all. Answers are stored unchanged; scores are computed from them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proxykd_jax.artifacts import complete_stage, open_stage, remove_leftovers, write_bytes
from proxykd_jax.errors import UserError
from proxykd_jax.peers import on_first, say, stop_if_wanted

Line = dict[str, Any]
# (indices of items) -> one line per item, in this order; the same on every process.
Answering = Callable[[Sequence[int]], list[Line]]


@dataclass(frozen=True)
class AnswerStore:
    """A model's answers to the items of a task, in a folder of parts.

    Attributes:
      folder: folder of the parts.
      settings, inputs: what determines the answers, as in ``open_stage``.
      items_per_part: most items that a killed run loses.
      label: for progress reports.
    """

    folder: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, Any]
    items_per_part: int
    label: str

    def collect(self, count: int, answer: Callable[[], Answering]) -> None:
        """Makes the missing parts, if any.

        Args:
          count: number of items.
          answer: loads the model that answers; called only if a part is missing.

        Raises:
          UserError: the folder was made with other settings or by another model.
        """
        if open_stage(self.folder, "benchmark", self.settings, self.inputs):
            return
        parts = -(-count // self.items_per_part)
        missing = on_first(functools.partial(_missing, self.folder, parts))
        answering = answer() if missing else None
        for index in missing:
            assert answering is not None
            first = index * self.items_per_part
            places = range(first, min(count, first + self.items_per_part))
            lines = answering(places)
            write_bytes(_part(self.folder, index), lines_to_bytes(lines))
            say(f"evaluate: {self.label}: {places.stop} of {count} items")
            stop_if_wanted()
        complete_stage(self.folder, counts={"items": count})

    def read(self) -> list[Line]:
        """The lines of all parts, in order.

        Raises:
          UserError: a part is damaged.
        """
        lines: list[Line] = []
        for path in sorted(self.folder.glob("part_*.jsonl")):
            lines += _read(path)
        return lines


def lines_to_bytes(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """JSON Lines, with keys in the given order."""
    # Escape: a server may send halves of surrogate pairs, which UTF-8 cannot encode.
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _part(folder: Path, index: int) -> Path:
    return folder / f"part_{index:05d}.jsonl"


def _missing(folder: Path, parts: int) -> list[int]:
    remove_leftovers(folder)
    missing = []
    for index in range(parts):
        path = _part(folder, index)
        if path.exists():
            _read(path)
        else:
            missing.append(index)
    return missing


def _read(path: Path) -> list[Line]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); remove it and run again: its items are asked again."
        ) from error
