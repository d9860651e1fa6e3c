"""What is said of a file whose layout is not known: its keys, and the nearest format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.texts.benchmark_files import BENCHMARK_KEYS
from proxykd_jax.texts.columns import listed
from proxykd_jax.texts.formats import FORMATS

Record = Mapping[str, Any]
# Names that columns of questions, answers and turns often have, and the type of their values.
_ASKED = ("question", "query", "instruction", "input", "problem", "user", "human", "request", "q")
_ANSWERED = ("answer", "reply", "output", "completion", "assistant", "solution", "target", "a")
_TURNS = ("dialog", "dialogue", "chat", "turns", "conversation", "conversations", "history")
_NAMES = {"prompt": (_ASKED, str), "response": (_ANSWERED, str), "messages": (_TURNS, list)}
# What a column with such a name counts beside one with the very name.
_GUESSED = 0.75


def unknown_layout(record: Record, origin: str) -> UserError:
    """The error for a first row that no format knows."""
    guesses = _guesses(record)
    name, missing = _nearest(record, guesses)
    near = f"The nearest is {name}: {missing}. " if name else ""
    if "messages" in guesses:
        example = f"messages: {guesses['messages']}"
    else:
        example = ", ".join(f"{key}: {guesses.get(key, '...')}" for key in ("prompt", "response"))
    known = {name: entry.keys for name, entry in FORMATS.items()} | BENCHMARK_KEYS
    formats = "\n  ".join(f"{name}: {keys}" for name, keys in known.items())
    return UserError(
        f"{origin} has the keys {describe_keys(record)}, which no known format has. {near}Map the "
        f"file's own columns, such as columns: {{{example}}}, or rename them to one of these:\n  "
        f"{formats}"
    )


def describe_keys(record: Record) -> str:
    """The keys of a row with the types of their values."""
    names = [f"{key} ({type(value).__name__})" for key, value in record.items()]
    return listed(names)


def _nearest(record: Record, guesses: Mapping[str, str]) -> tuple[str, str]:
    """The format of which a row has most keys, and what the row lacks; empty if it has none."""
    best, name, missing = 0.0, "", ""
    # The plainest comes first, and stays where another is as near.
    for tried in sorted(FORMATS, key=lambda name: name != "prompt_response"):
        needs = FORMATS[tried].needs
        lacks = [keys for keys in needs if record.keys().isdisjoint(keys)]
        near = sum(_GUESSED for keys in lacks if keys[0] in guesses)
        share = (len(needs) - len(lacks) + near) / len(needs)
        if share > best:
            best, name = share, tried
            missing = f"it also needs {' and '.join(keys[0] for keys in lacks)}"
            if not lacks:
                missing = f"its {' and '.join(keys[0] for keys in needs)} hold other values"
    return name, missing


def _guesses(record: Record) -> dict[str, str]:
    """key -> the column that seems to hold it, by its name."""
    parts = {key: key.lower().replace("-", "_").split("_") for key in record}
    found = {}
    for key, (names, kind) in _NAMES.items():
        fitting = [column for column, value in record.items() if isinstance(value, kind)]
        guess = next((c for name in (key, *names) for c in fitting if name in parts[c]), None)
        if guess is not None:
            found[key] = guess
    return found
