"""Reads CSV and TSV files: with a row of column names, or MMLU's files, which may have none.

Cells are texts and stay as they are. Columns are separated by commas, tabs or semicolons, as the
first row shows. A row with more or fewer cells than the file has columns is counted and dropped,
because its texts may stand in the wrong columns. A damaged file is an error.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import IO

from proxykd_jax.errors import UserError
from proxykd_jax.texts.json_files import MAX_RECORD_BYTES, Record, open_decompressed, reading
from proxykd_jax.texts.records import UnreadableRow

MORE_CELLS = "a row with more cells than the file has columns"
FEWER_CELLS = "a row with fewer cells than the file has columns"
_SEPARATORS = ",\t;"
# The first row is found in so many lines; it may hold quoted line breaks.
_FIRST_LINES = 100
_LONGEST_NAME = 100
_MMLU_COLUMNS = 6
_MOST_BLANK = 100_000
_MMLU_ANSWERS = ("answer", "target", "label", "correct", "gold")


def read_csv(path: Path) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, "file:line")`` of a CSV or TSV file, by the line where a row begins.

    A row of MMLU without a row of names (or with its own) becomes ``{question, choices, answer}``;
    its line is the one where it ends.

    Raises:
      UserError: the file is empty, not UTF-8 or damaged, or its first row gives no names.
    """
    # The csv module refuses cells of more than 128 KiB unless told otherwise.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with reading(path), open_decompressed(path) as file:
        yield from _read(path, file)


def _read(path: Path, file: IO[bytes]) -> Iterator[tuple[Record, str]]:
    lines = _lines(path, file)
    head = list(islice(lines, _FIRST_LINES))
    separator = _separator(head)
    reader = csv.reader(chain(head, lines), delimiter=separator, strict=True)
    rows = 0
    try:
        first = next((row for row in reader if row), None)
        if first is None:
            raise UserError(f"{path} is empty: it holds no row. Remove it or fill it.")
        if _is_mmlu(first) or _is_mmlu_names(first):
            begun = [] if _is_mmlu_names(first) else [first]
            for row in chain(begun, reader):
                if row:
                    rows += 1
                    yield _mmlu(row, f"{path}:{reader.line_num}")
        else:
            names = _names(first, path)
            before = reader.line_num
            for row in reader:
                if row:
                    rows += 1
                    yield _record(row, names), f"{path}:{before + 1}"
                before = reader.line_num
    except csv.Error as error:
        if "new-line character" in str(error):
            raise UserError(
                f"{path}: its lines end with carriage returns alone. Convert the file, for "
                "example with: tr '\\r' '\\n'"
            ) from error
        raise UserError(
            f"{path}:{reader.line_num} is damaged CSV: {error}. A cell with quotes or line "
            "breaks stands in quotes, and quotes within it are doubled."
        ) from error
    if not rows:
        raise UserError(f"{path} holds column names and no row. Remove it or fill it.")


def _lines(path: Path, file: IO[bytes]) -> Iterator[str]:
    number = blank = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            raise UserError(f"{path}:{number + 1} is longer than {MAX_RECORD_BYTES >> 20} MiB.")
        blank = 0 if line.strip() else blank + 1
        if blank > _MOST_BLANK:
            raise UserError(f"{path}:{number + 1} is damaged: {blank:,} blank lines precede it.")
        if not number and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UserError(
                f"{path} is UTF-16, but text must be UTF-8. Convert it, for example with: "
                f"iconv -f UTF-16 -t UTF-8 {path.name}"
            )
        try:
            # A byte order mark begins a file; within one it is a character of a cell.
            yield line.decode("utf-8" if number else "utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number + 1} is not UTF-8 (byte 0x{error.object[error.start]:02x}). If "
                "the file is Latin-1, convert it, for example with: iconv -f LATIN1 -t UTF-8"
            ) from error
        number += 1


def _separator(head: list[str]) -> str:
    """The separator that gives the first row the most columns."""
    firsts: dict[str, list[str]] = {}
    for separator in _SEPARATORS:
        rows = csv.reader(head, delimiter=separator)
        try:
            firsts[separator] = next((row for row in rows if row), [])
        except csv.Error:  # it comes again where the rows are read
            firsts[separator] = []
    if _is_mmlu(firsts[","]):
        return ","
    return max(_SEPARATORS, key=lambda separator: len(firsts[separator]))


def _names(first: Sequence[str], path: Path) -> list[str]:
    """The names of the columns; a column without one is called by its number."""
    names = [cell.strip() or f"column {number}" for number, cell in enumerate(first, 1)]
    if not first[0].strip() and "index" not in names:
        names[0] = "index"  # of tables that libraries write
    if any(len(name) > _LONGEST_NAME or "\n" in name for name in names):
        raise UserError(
            f"{path}: its first row holds texts and no column names. Put a row of names first, "
            "such as: prompt,response"
        )
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{path} has two columns of the name {twice}. Rename one of them.")
    return names


def _record(row: list[str], names: list[str]) -> Record:
    if len(row) != len(names):
        return UnreadableRow(MORE_CELLS if len(row) > len(names) else FEWER_CELLS)
    return dict(zip(names, row, strict=True))


def _is_mmlu(row: Sequence[str]) -> bool:
    return len(row) == _MMLU_COLUMNS and row[-1].strip() in tuple("ABCD0123")


def _is_mmlu_names(row: Sequence[str]) -> bool:
    names = [cell.strip().lower() for cell in row]
    return len(row) == _MMLU_COLUMNS and names[0] == "question" and names[-1] in _MMLU_ANSWERS


def _mmlu(row: Sequence[str], origin: str) -> tuple[Record, str]:
    """Question, four choices and answer: a letter, or 0 to 3 if the file has a row of names."""
    if not _is_mmlu(row):
        raise UserError(
            f"{origin} is not a row of MMLU (question, four choices, answer as A to D or 0 to 3), "
            "as the file's first row is."
        )
    return {"question": row[0], "choices": list(row[1:5]), "answer": row[-1].strip()}, origin
