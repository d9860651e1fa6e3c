"""A file's own column names become the keys that are read (``columns`` of a source)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from proxykd_jax.errors import UserError
from proxykd_jax.texts.records import RowProblem
from proxykd_jax.texts.row_keys import RECORDS

Record = Mapping[str, Any]
_SHOWN, _NAME_SHOWN = 30, 60


def with_columns(record: Record, columns: Mapping[str, str], *, prompts_only: bool) -> Record:
    """A row whose columns have the names of the keys that they are.

    A key of the row's own that a column takes the place of stays under another name, so that it is
    counted as unread.

    Args:
      record: the row as its file holds it.
      columns: key -> column.
      prompts_only: the column of the response may be missing.

    Raises:
      RowProblem: the row lacks a column.
    """
    if not columns:
        return record
    moved = {}
    for key, column in columns.items():
        if column in record:
            moved[key] = record[column]
        elif not (prompts_only and key == "response"):
            raise RowProblem(f"no column {column} (columns.{key})")
    taken = set(columns.values())
    rest = {
        f"{key} (the file's own)" if key in moved else key: value
        for key, value in record.items()
        if key not in taken and not (key in moved and key in RECORDS)
    }
    return moved | rest


def check_columns(
    record: Record, origin: str, columns: Mapping[str, str], *, prompts_only: bool
) -> None:
    """Checks that a file's first row has the columns that the config names.

    Raises:
      UserError: one is missing; the message names the nearest.
    """
    for key, column in columns.items():
        if column in record or (prompts_only and key == "response"):
            continue
        close = difflib.get_close_matches(column, record, n=1)
        raise UserError(
            f"{origin} has no column {column!r}, which columns.{key} names. It has "
            f"{listed(record)}" + (f"; the nearest is {close[0]!r}." if close else ".")
        )


def listed(names: Iterable[str]) -> str:
    """Names of columns for a message: the first ones, each up to a length."""
    names = list(names)
    shown = [n if len(n) <= _NAME_SHOWN else f"{n[:_NAME_SHOWN]}..." for n in names[:_SHOWN]]
    more = len(names) - _SHOWN
    return (", ".join(shown) or "none") + (f" and {more} more" if more > 0 else "")
