"""Tables of several runs together: other seeds, other regimes.

python -m benchmarks.paper_tables.join runs/seeds_0_3 runs/seeds_4_7 --out runs/seeds_0_7
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper_tables.metrics import EITHER_PRESET, Record
from proxykd_jax.artifacts import read_json, write_bytes, write_json
from proxykd_jax.errors import UserError


def join(folders: Sequence[Path], out: Path) -> list[Record]:
    """Writes ``tables.json``, ``tables.md`` and the figures of all runs together.

    Of methods that not every run measured on its seeds there are no paired differences.

    Raises:
      UserError: a folder without ``tables.json``, or a number that two runs have.
    """
    from benchmarks.paper_tables import figures, tables
    from benchmarks.paper_tables.statistics import Results

    records: dict[tuple[str, str, str, str, int, str], Record] = {}
    for folder in folders:
        if not (folder / "tables.json").exists():
            raise UserError(f"{folder} has no tables.json. Let its run finish first.")
        for fields in read_json(folder / "tables.json"):
            record = Record(**fields)
            key = (
                record.regime,
                record.preset,
                record.method,
                record.checkpoint,
                record.seed,
                record.metric,
            )
            if key in records:
                raise UserError(f"{folder} and a run before it both hold {key}. Name one of them.")
            records[key] = record
    found = list(records.values())
    cells = list(dict.fromkeys((r.regime, r.preset) for r in found if r.preset != EITHER_PRESET))
    seeds = sorted({record.seed for record in found})
    command = "python -m benchmarks.paper_tables.join " + " ".join(map(str, folders))
    notes = [f"Seeds {', '.join(map(str, seeds))} of {len(folders)} runs.", "", tables.READING]
    write_json(out / "tables.json", [record.to_json() for record in found])
    text = tables.write_tables(found, cells, command=command, notes=notes)
    write_bytes(out / "tables.md", text.encode())
    for cell in cells:
        figures.draw(out, Results(found, *cell))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper_tables.join",
        description="Tables and figures of several runs together.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="what --out named")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and figures")
    arguments = parser.parse_args(argv)
    try:
        join(arguments.folders, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
