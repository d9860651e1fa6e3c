"""What is said of a file whose layout is not known: its keys, and the nearest format."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.texts.benchmark_files import BENCHMARK_KEYS
from proxykd_jax.texts.columns import listed
from proxykd_jax.texts.formats import FORMATS

Record = Mapping[str, Any]
# Names that columns of questions, answers and turns often have.
_ASKED = ("question", "query", "instruction", "input", "problem", "user", "human", "request", "q")
_ANSWERED = ("answer", "reply", "output", "completion", "assistant", "solution", "target", "a")
_TURNS = ("dialog", "dialogue", "chat", "turns", "conversation", "conversations", "history")


def unknown_layout(record: Record, origin: str) -> UserError:
    """The error for a first row that no format knows."""
    name, missing = _nearest(record)
    near = f"The nearest is {name}, without {missing}. " if missing else ""
    known = {name: entry.keys for name, entry in FORMATS.items()} | BENCHMARK_KEYS
    formats = "\n  ".join(f"{name}: {keys}" for name, keys in known.items())
    return UserError(
        f"{origin} has the keys {describe_keys(record)}, which no known format has. {near}Map the "
        f"file's own columns, such as {_example(record)}, or rename them to one of these:\n  "
        f"{formats}"
    )


def describe_keys(record: Record) -> str:
    """The keys of a row with the types of their values."""
    names = [f"{key} ({type(value).__name__})" for key, value in record.items()]
    return listed(names)


def _nearest(record: Record) -> tuple[str, str]:
    """The format of which a row has the largest share of keys, and those that it lacks.

    Both are empty if it has none of any.
    """
    best, name, missing = 0.0, "", ""
    # The plainest comes first, and stays where another has as large a share.
    for tried in sorted(FORMATS, key=lambda name: name != "prompt_response"):
        entry = FORMATS[tried]
        lacks = [keys for keys in entry.needs if record.keys().isdisjoint(keys)]
        share = 1 - len(lacks) / len(entry.needs)
        if share > best:
            best, name = share, tried
            wrong = [keys for keys in entry.needs if keys not in lacks]
            # It has all the keys, so their values are of another type.
            missing = (
                " and ".join(" or ".join(keys[:3]) for keys in lacks)
                or f"the right values under {' and '.join(keys[0] for keys in wrong)}"
            )
    return name, missing


def _example(record: Record) -> str:
    """``columns`` with the row's names where they can be guessed."""
    turns = _guess(record, _TURNS, list)
    if turns is not None:
        return f"columns: {{messages: {turns}}}"
    asked = _guess(record, ("prompt", *_ASKED), str) or "..."
    answered = _guess(record, ("response", *_ANSWERED), str) or "..."
    return f"columns: {{prompt: {asked}, response: {answered}}}"


def _guess(record: Record, words: Iterable[str], kind: type) -> str | None:
    """The first column whose name is one of these words, or has one as a part."""
    parts = {key: key.lower().replace("-", "_").split("_") for key in record}
    fitting = [key for key, value in record.items() if isinstance(value, kind)]
    return next((key for word in words for key in fitting if word in parts[key]), None)
