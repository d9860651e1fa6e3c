"""The name of the teacher, where the run's files tell it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from proxykd_jax.reporting.run_folder import RunFolder
from proxykd_jax.texts.teachers import DEFAULT_TEACHER

# Formats with answers of several models, of which ``teacher`` selects one, by default this one.
_SELECTING = ("nectar", "openorca")
_FIRST_LINE = 1 << 20


def teacher_names(run: RunFolder) -> list[str]:
    """Names of the teachers of a run's sources, without repetitions; empty if none is known."""
    return list(dict.fromkeys(name for source in _sources(run) if (name := name_of(run, source))))


def name_of(run: RunFolder, source: Mapping[str, Any]) -> str | None:
    """The teacher of a source; None if unknown."""
    if source.get("teacher"):
        return str(source["teacher"])
    if source.get("format") in _SELECTING:
        return DEFAULT_TEACHER
    path = source.get("path")
    return None if path is None else _collected(run, Path(path))


def _sources(run: RunFolder) -> Iterator[Mapping[str, Any]]:
    yield from run.setting("corpus.sources") or []


def _collected(run: RunFolder, path: Path) -> str | None:
    """The model that ``proxykd collect`` asked for these answers."""
    folder, model = run.setting("collect.folder"), run.setting("collect.model")
    if folder and model and Path(folder) in (path, path.parent):
        return str(model)
    path = path / "answers.jsonl" if path.is_dir() else path
    if path.suffix != ".jsonl":
        return None
    try:
        with open(path, "rb") as file:
            row = json.loads(file.readline(_FIRST_LINE))
    except (OSError, ValueError):
        return None
    # These keys together are those of a line that ``collect`` writes.
    if isinstance(row, dict) and {"model", "served_model", "finish_reason"} <= set(row):
        return str(row["model"])
    return None
