"""Joins the tables of several runs with other seeds or other regimes.

python -m benchmarks.paper_tables.join runs/seeds_0_3 runs/seeds_4_7 --out runs/seeds_0_7
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import exit_code
from benchmarks.paper_tables import tables
from benchmarks.paper_tables.metrics import EITHER_PRESET, Record
from proxykd_jax.artifacts import read_json
from proxykd_jax.errors import UserError


def join(folders: Sequence[Path], out: Path) -> list[Record]:
    """Writes ``tables.json``, ``tables.md`` and the figures of all runs together.

    A method that some run did not measure has no paired differences.

    Raises:
      UserError: a folder has no ``tables.json``, or two runs hold the same number.
    """
    records: dict[tuple[str | int, ...], Record] = {}
    for folder in folders:
        if not (folder / "tables.json").exists():
            raise UserError(f"{folder} has no tables.json. Let its run finish first.")
        for fields in read_json(folder / "tables.json"):
            key = tuple(value for name, value in fields.items() if name != "value")
            if key in records:
                raise UserError(f"{folder} and a run before it both hold {key}. Name one of them.")
            records[key] = Record(**fields)
    found = list(records.values())
    cells = list(dict.fromkeys((r.regime, r.preset) for r in found if r.preset != EITHER_PRESET))
    seeds = sorted({record.seed for record in found})
    command = "python -m benchmarks.paper_tables.join " + " ".join(map(str, folders))
    notes = [f"Seeds {', '.join(map(str, seeds))} of {len(folders)} runs.", "", tables.READING]
    tables.write_all(out, found, cells, command=command, notes=notes)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_tables.join",
        description="Make tables and figures of several runs together.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders that --out named")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: join(arguments.folders, arguments.out))


if __name__ == "__main__":
    raise SystemExit(main())
