"""Lists the files that a path of the config names, and reads their rows by content type."""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator
from pathlib import Path

from proxykd_jax.errors import UserError
from proxykd_jax.texts.columnar_files import read_parquet
from proxykd_jax.texts.json_files import Record, open_decompressed, read_json_records

ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".csv")
_MMLU_COLUMNS = 6


def list_files(pattern: str) -> list[Path]:
    """The files of a path, sorted: a file, all files below a folder, or the matches of a glob.

    In folders, hidden files and files with endings other than ``ENDINGS`` are skipped. A file that
    is named, or that a glob matches, is always read.

    Raises:
      UserError: there are none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.is_file()
            and file.name.endswith(ENDINGS)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        )
        if not files:
            raise UserError(
                f"The folder {pattern} holds no file that ends in {', '.join(ENDINGS)}."
            )
        return files
    files = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{pattern} does not exist, or matches no file.")
    return files


def read_file(path: Path) -> Iterator[tuple[Record, str]]:
    """Yields ``(record, origin)`` of one file: Parquet, CSV in MMLU's form, or JSON.

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
    if path.name.endswith(".parquet"):
        raise UserError(f"{path} is not a Parquet file: it does not begin with PAR1.")
    if path.name.endswith(".csv"):
        return _read_mmlu_csv(path)
    return read_json_records(path)


def _read_mmlu_csv(path: Path) -> Iterator[tuple[Record, str]]:
    """Question, four choices and answer: a letter, or 0 to 3 if the file has a header."""
    with open_decompressed(path) as binary:
        lines = (line.decode("utf-8-sig") for line in binary)
        reader = csv.reader(lines, strict=True)
        rows = 0
        try:
            for row in reader:
                origin = f"{path}:{reader.line_num}"
                if rows == 0 and row and row[0].strip().lower() == "question":
                    continue
                if not row:
                    continue
                answer = row[-1].strip()
                if len(row) != _MMLU_COLUMNS or answer not in tuple("ABCD0123"):
                    raise UserError(
                        f"{origin} is not a row of MMLU (question, four choices, answer as A to D "
                        "or 0 to 3). CSV is read in this form alone; convert other CSV files to "
                        "JSON Lines."
                    )
                rows += 1
                yield {"question": row[0], "choices": row[1:5], "answer": answer}, origin
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{reader.line_num + 1} is damaged CSV: {error}.") from error
    if not rows:
        raise UserError(f"{path} is empty: it holds no row. Remove it or fill it.")
