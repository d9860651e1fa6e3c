"""A strict reader of JSON Lines and JSON arrays, one record at a time.

Loaders that guess types turn date-like texts into dates and mixed ids into numbers. This one
returns what the file contains, or an error with file and line. It accepts UTF-8 only (a byte order
mark is skipped, also where files were joined), objects only and no repeated keys. NaN and infinity,
which some libraries write, are read as null. It detects compression by content, not
by name. Memory is bounded by ``MAX_RECORD_BYTES``, whatever the file's size.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from proxykd_jax.errors import UserError
from proxykd_jax.texts.zstd_files import MAGIC as ZSTD_MAGIC
from proxykd_jax.texts.zstd_files import open_zstd

MAX_RECORD_BYTES = 32 << 20
_CHUNK = 1 << 20
_SPACE = " \t\r\n"
_NOT_SPACE = re.compile(f"[^{_SPACE}]")
# Tool calls and their schemas nest up to 20 deep.
_MOST_DEPTH = 200

Record = dict[str, Any]


def read_json_records(
    path: Path, *, max_record_bytes: int = MAX_RECORD_BYTES
) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, "file:line")`` of a JSON Lines file or of a file that is one JSON array.

    The first character decides between the two forms, so the file name does not matter. A file that
    is one object over several lines is one record.

    Raises:
      UserError: the file is empty, truncated, not UTF-8, not JSON, or contains something other than
        objects; a record is longer than ``max_record_bytes``.
    """
    with reading(path), open_decompressed(path) as file:
        head = file.peek(4)[:4]  # type: ignore[attr-defined]
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
            raise UserError(
                f"{path} is UTF-16 or UTF-32, but text must be UTF-8. Convert it, for "
                f"example with: iconv -f UTF-16 -t UTF-8 {path.name}"
            )
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        lines_before, first = _skip_blank_lines(path, file, max_record_bytes)
        if first is None:
            raise UserError(f"{path} is empty: it holds no row. Remove it or fill it.")
        if first.lstrip()[:1] == b"[":
            yield from _read_array(path, file, first, lines_before + 1, max_record_bytes)
        else:
            yield from _read_lines(path, file, first, lines_before + 1, max_record_bytes)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a damaged or unreadable file raises into a ``UserError``."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path} is a damaged gzip file ({error}). Copy or compress it again."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def open_decompressed(path: Path) -> IO[bytes]:
    """Opens a file for reading bytes; gzip and Zstandard are detected by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head == ZSTD_MAGIC:
        return open_zstd(path)
    compressed = head.startswith(b"\x1f\x8b")
    return cast(IO[bytes], gzip.open(path, "rb") if compressed else open(path, "rb"))


def parse_object(text: str) -> Record:
    """One strict JSON object.

    Raises:
      ValueError: not JSON, a repeated key, or not an object.
    """
    try:
        value = _DECODER.decode(text)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if not isinstance(value, dict):
        raise ValueError(f"a row must be an object {{...}}, not {_kind(value)}")
    if text.count("{") + text.count("[") > _MOST_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = "the nesting is too deep"


def _check_depth(value: Any) -> None:
    """Refuses what the parser can read but later steps could not."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _unique_keys(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} occurs twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=lambda name: None)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {list: "an array", str: "a string", bool: "a truth value"}
    return names.get(type(value), "a number")


def _skip_blank_lines(path: Path, file: IO[bytes], limit: int) -> tuple[int, bytes | None]:
    blank = _skip_space(file)
    line = file.readline(_CHUNK)
    # Read a line longer than the chunk to its end, except for an array, which may be one long line
    # and is only needed up to its first bytes.
    if line and not line.endswith(b"\n") and line[:1] != b"[":
        line += file.readline(limit + 1)
        _check_length(path, blank + 1, line, limit)
    return blank, line or None


def _skip_space(file: IO[bytes]) -> int:
    """Skips white space a block at a time; returns the number of line breaks in it."""
    blank = 0
    while block := file.peek(_CHUNK):  # type: ignore[attr-defined]
        space = len(block) - len(block.lstrip())
        blank += block.count(b"\n", 0, space)
        file.read(space)
        if space < len(block):
            break
    return blank


def _check_length(path: Path, number: int, line: bytes, limit: int) -> None:
    if len(line) > limit:
        raise UserError(
            f"{path}:{number} is longer than {limit >> 20} MiB, which no model could read as one "
            "row. Rows of JSON Lines end with a line break; check that they do."
        )


def _read_lines(
    path: Path, file: IO[bytes], first: bytes, number: int, limit: int
) -> Iterator[tuple[Record, str]]:
    line = first
    start = number
    while line:
        _check_length(path, number, line, limit)
        if line.strip():
            origin = f"{path}:{number}"
            text = _decode(line, origin)
            try:
                record = parse_object(text.lstrip("\ufeff") if text[:1] == "\ufeff" else text)
            except ValueError as error:
                following = file.readline(limit + 1)
                if number == start and following and isinstance(error, json.JSONDecodeError):
                    whole = _whole_object(file, line + following, limit)
                    if whole is not None:
                        yield whole, origin
                        return
                cut_off = not following and not line.endswith(b"\n")
                raise UserError(_line_problem(origin, text, error, cut_off)) from error
            yield record, origin
        else:
            number += _skip_space(file)
        line = file.readline(limit + 1)
        number += 1


def _whole_object(file: IO[bytes], start: bytes, limit: int) -> Record | None:
    """The file as one object over several lines, if it is one."""
    data = start + file.read(max(limit - len(start), 0) + 1)
    if len(data) > limit:
        return None
    try:
        return parse_object(data.decode("utf-8"))
    except ValueError:
        return None


def _line_problem(origin: str, text: str, error: ValueError, cut_off: bool) -> str:
    if isinstance(error, json.JSONDecodeError):
        if "\0" in text:
            return f"{origin} holds NUL bytes: it is not UTF-8 text. Convert or remove the file."
        if "\r" in text.rstrip("\r\n") and error.msg == "Extra data":
            return (
                f"{origin}: its lines end with carriage returns alone. Convert the file, for "
                "example with: tr '\\r' '\\n'"
            )
        if cut_off:
            return (
                f"{origin}: the last line is cut off ({error.msg}, column {error.colno}). "
                "Copy the file again or remove the line."
            )
        return (
            f"{origin} is not JSON ({error.msg}, column {error.colno}). Every line must be one "
            "JSON object."
        )
    return f"{origin}: {error}."


def _decode(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{origin} is not UTF-8 (byte 0x{data[error.start]:02x}). If the file is Latin-1, "
            "convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error


def _read_array(
    path: Path, file: IO[bytes], first: bytes, number: int, limit: int
) -> Iterator[tuple[Record, str]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, place, count, ended = _decode_part(decoder, first, path), 0, 0, False

    def refill(size: int) -> None:
        """Drops the consumed text and reads more."""
        nonlocal text, place, ended
        data = file.read(size)
        ended = not data
        text, place = text[place:] + _decode_part(decoder, data, path, final=ended), 0

    def next_character() -> str:
        nonlocal place, number
        while True:
            start, end = place, len(text)
            found = _NOT_SPACE.search(text, place)
            place = end if found is None else found.start()
            number += text.count("\n", start, place)
            if place < end:
                return text[place]
            if ended:
                raise UserError(
                    f"{path} is cut off: its array has no closing ']'. Copy the file again."
                )
            refill(_CHUNK)

    next_character()
    place += 1
    while (character := next_character()) != "]":
        if count:
            if character != ",":
                raise UserError(f"{path}:{number}: a ',' or ']' must follow row {count}.")
            place += 1
            character = next_character()
        if character != "{":
            raise UserError(
                f"{path}:{number}: every row of the array must be an object {{...}}; row "
                f"{count + 1} begins with {character!r}."
            )
        while True:
            try:
                record, end = _DECODER.raw_decode(text, place)
                if text.count("{", place, end) + text.count("[", place, end) > _MOST_DEPTH:
                    _check_depth(record)
                break
            except RecursionError as error:
                raise UserError(f"{path}:{number}: {_TOO_DEEP}.") from error
            except ValueError as error:
                # Either the record is damaged, or its end has not been read yet. Doubling the
                # buffer keeps the cost of retries proportional to the record's length.
                if not isinstance(error, json.JSONDecodeError):
                    raise UserError(f"{path}:{number}: {error}.") from error
                if ended:
                    raise UserError(
                        f"{path}: row {count + 1}, which begins at line {number}, is not JSON or "
                        f"is cut off ({error.msg})."
                    ) from error
                if len(text) - place > limit:
                    raise UserError(
                        f"{path}: row {count + 1}, which begins at line {number}, is not JSON "
                        f"({error.msg}) or longer than {limit >> 20} MiB."
                    ) from error
                refill(max(_CHUNK, len(text) - place))
        yield record, f"{path}:{number}"
        count += 1
        number += text.count("\n", place, end)
        place = end
    place += 1
    while not ended:
        if text[place:].strip(_SPACE):
            break
        place = len(text)
        refill(_CHUNK)
    if text[place:].strip(_SPACE):
        raise UserError(f"{path}:{number}: text follows the end of the array. Remove it.")
    if not count:
        raise UserError(f"{path} is empty: its array holds no row. Remove it or fill it.")


def _decode_part(
    decoder: codecs.IncrementalDecoder, data: bytes, path: Path, *, final: bool = False
) -> str:
    try:
        return decoder.decode(data, final)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}). Convert it, for "
            "example with: iconv -f LATIN1 -t UTF-8"
        ) from error
