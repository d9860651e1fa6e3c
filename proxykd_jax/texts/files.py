"""Lists the files that a path of the config names, and reads their rows by content type."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from proxykd_jax.errors import UserError
from proxykd_jax.small_files import in_kernel, special_file
from proxykd_jax.texts.columnar_files import read_parquet
from proxykd_jax.texts.csv_files import read_csv
from proxykd_jax.texts.json_files import Record, read_json_records

_COMPRESSED = (".gz", ".zst")
_ROWS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
ENDINGS = (*(row + more for more in ("", *_COMPRESSED) for row in _ROWS), ".parquet")
# Files that libraries put beside the rows.
_ABOUT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_HELD_OUT = re.compile(
    r"(?:tests?|val|valid|validation|dev|eval|evaluation|held_?out|hold_?out)"
    r"(?:set|data|split|ing)?\d*"
)
_FOR_TRAINING = re.compile(r"train(?:ing)?(?:set|data|split)?\d*")
_WORD_BREAK = re.compile(r"[^a-zA-Z0-9]+|(?<=[a-z])(?=[A-Z])")
_OTHER_CONTENT = {
    b"BZh": "compressed with bzip2",
    b"\xfd7zX": "compressed with xz",
    b"PK\x03\x04": "a ZIP archive",
    b"ARRO": "an Arrow file",
}


class SourceFiles(NamedTuple):
    """The files of a source.

    Attributes:
      files: those that are read, sorted.
      passed_over: the others, with the reasons; names are relative to the folder.
    """

    files: list[Path]
    passed_over: dict[str, str]


def list_files(pattern: str) -> list[Path]:
    """The files of a path, sorted: a file, all files below a folder, or the matches of a glob.

    In folders, hidden files and files with endings other than ``ENDINGS`` are skipped. A file that
    is named, or that a glob matches, is always read.

    Raises:
      UserError: there are none.
    """
    return _find(pattern).files


def source_files(pattern: str, *, held_out: bool = False) -> SourceFiles:
    """The files of a path that serve one purpose. A file that is named by itself always serves.

    A glob whose own words say test or validation is read whole, and so is a folder that says it
    and holds only files that say it.

    Args:
      pattern: file, folder or glob.
      held_out: the rows are a test set. Then files that say train by their name are passed over
        where others say test or validation; otherwise the latter are.

    Raises:
      UserError: there are none.
    """
    found = _find(pattern)
    root = Path(pattern)
    if root.is_file():
        return found
    inside = {file: _inside(file, root) for file in found.files}
    said = {file: _says(name, _HELD_OUT) for file, name in inside.items()}
    if held_out:
        wrong = {f: _says(name, _FOR_TRAINING) for f, name in inside.items() if not said[f]}
        wrong = wrong if any(said.values()) else {}
    else:
        # A glob whose own words say test asks for just these files, and so does a folder that says
        # test and holds nothing else.
        asked = _says(root.name, _HELD_OUT) and (not root.is_dir() or all(said.values()))
        wrong = {} if asked else said
    files = [file for file in found.files if not wrong.get(file)]
    passed_over = found.passed_over | {
        inside[file]: f"its name says {wrong[file]}" for file in found.files if wrong.get(file)
    }
    if not files:
        listed = ", ".join(sorted(passed_over)[:3])
        raise UserError(
            f"{pattern} holds no file to train on: {listed} say by their names that they are held "
            "out. Name a file by itself to read it nevertheless."
        )
    return SourceFiles(files, dict(sorted(passed_over.items())))


def _find(pattern: str) -> SourceFiles:
    path = Path(pattern)
    special = None if path.is_dir() else special_file(path)
    if special:
        raise UserError(f"{pattern} cannot be read: {special}.")
    if path.is_file():
        return SourceFiles([path], {})
    if path.is_dir():
        if in_kernel(path):
            raise UserError(f"{pattern} cannot be read: it belongs to the system's kernel.")
        return _in_folder(path)
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file() and not in_kernel(file)]
    if not files:
        raise UserError(f"{pattern} does not exist, or matches no file.")
    return SourceFiles(files, {})


def _in_folder(path: Path) -> SourceFiles:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise UserError(
            f"{path} was written by save_to_disk. Name it under dataset instead of path."
        )
    files, passed_over = [], {}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        if file.is_symlink() and in_kernel(file):
            continue
        if file.name in _ABOUT_ROWS:
            passed_over[str(inside)] = "it holds no rows"
        elif file.name.lower().endswith(ENDINGS):
            files.append(file)
        else:
            passed_over[str(inside)] = "its ending is not read"
    if not files:
        raise UserError(f"The folder {path} holds no file that ends in {', '.join(ENDINGS)}.")
    return SourceFiles(files, passed_over)


def _inside(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if root.is_dir() else file.name


def _says(name: str, words: re.Pattern[str]) -> str | None:
    """The word in a file's name, or in its folders', that is one of these."""
    for part in Path(name).parts:
        pieces = [piece for piece in _WORD_BREAK.split(part) if piece]
        pairs = [f"{a}_{b}" for a, b in itertools.pairwise(pieces)]
        for piece in (*pieces, *pairs):
            if words.fullmatch(piece.lower()):
                return piece
    return None


def read_file(path: Path) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, origin)`` of one file: Parquet, CSV, TSV or JSON.

    Raises:
      UserError: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if head == b"PAR1":
        return read_parquet(path)
    name = path.name.lower()
    if name.endswith(".parquet"):
        raise UserError(f"{path} is not a Parquet file: it does not begin with PAR1.")
    for begins, what in _OTHER_CONTENT.items():
        if head.startswith(begins):
            raise UserError(f"{path} is {what}, which is not read. Give JSON Lines or Parquet.")
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith((".csv", ".tsv")):
        return read_csv(path)
    return read_json_records(path)
