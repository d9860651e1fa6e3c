"""Runs the rows of the paper's Table 1, 2, 3 or 5, or of its Figure 3, 6 or 7, and writes the
results beside the paper's.

    proxykd tables --table configs/tables/table_2.yaml
    proxykd tables --table configs/tables/table_2.yaml --only proxy_kd,aligned

A row is a run in ``<runs>/<table>/<row>``. If another run below ``<runs>`` has finished a stage
with the same settings and inputs, the row links that stage. So rows share a corpus, a proxy and its
soft labels. Finished rows are not run again. After a kill the same command continues.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from proxykd_jax.artifacts import (
    borrowing,
    digest_file,
    digest_value,
    read_json,
    write_bytes,
    write_json,
)
from proxykd_jax.cli import base_parser, run_work
from proxykd_jax.config import Config, dump_config
from proxykd_jax.config.table_file import TableFile, TableRow, load_table
from proxykd_jax.errors import UserError
from proxykd_jax.peers import on_first, say

# The stages that a student's training reads.
_BEFORE_CURVES = ("prepare", "align", "sample", "score")

SUMMARY = (
    "Run the rows of a table or figure of the paper, and write the results beside the paper's."
)


def main(
    table: TableFile | str | Path, only: Sequence[str] = (), overrides: Sequence[str] = ()
) -> Path:
    """Runs the unfinished rows, and writes the table after each.

    Args:
      table: from ``load_table``, or the path of the table's file.
      only: names of rows (default: all).
      overrides: ``"key=value"`` for the runs' configs, applied after the table's and the row's own.

    Returns:
      The table, a Markdown file.

    Raises:
      UserError: there is no such row, or a stage of a run raises it.
    """
    from proxykd_jax import report
    from proxykd_jax.reporting.paper_table import ROW, write_table

    table = table if isinstance(table, TableFile) else load_table(table)
    # Read all configs before anything runs.
    chosen = [(row, table.run_of(row, overrides)) for row in table.chosen(only)]
    for row, config in chosen:
        record = config.folder / ROW
        outputs = row.model.endswith(".jsonl")
        absent = outputs and not on_first(Path(row.model).is_file)
        identity = config.model_dump(mode="json", exclude={"runs_dir"})
        if outputs and not absent:
            identity["outputs"] = digest_file(Path(row.model))
        made_from = digest_value(identity)
        if on_first(functools.partial(_is_made, record, made_from)):
            say(f"tables: {row.name} is finished")
        elif absent:
            say(f"tables: {row.name} is left out: there is no {row.model}")
        else:
            say(f"tables: {row.name}")
            found = run_row(table, row, config)
            write_json(record, {"made_from": made_from, **found})
            report.main(config)
            on_first(lambda: str(write_table(table)))
    return Path(on_first(lambda: str(write_table(table))))


def run_row(table: TableFile, row: TableRow, config: Config) -> dict[str, str | int]:
    """Trains what a row needs, and lets its model answer the benchmarks.

    Args:
      table: from ``load_table``.
      row: one of its rows.
      config: the config of the row's run.

    Returns:
      The model that answered (``model``), the kind of device (``device``) and the number of devices
      (``devices``).

    Raises:
      UserError: a stage raises it.
    """
    import jax

    from proxykd_jax import align, distill, run
    from proxykd_jax.tasks.benchmark import run_benchmarks

    kept = config.folder / "config.yaml"
    if not on_first(kept.exists):
        write_bytes(kept, dump_config(config).encode())
    lenders = on_first(functools.partial(_runs_below, table.folder.parent))
    # A linked stage has neither the times of Table 3 nor the curves of Figures 6 and 7.
    stages = ("prepare",) if row.phase else _BEFORE_CURVES if table.has_curves else None
    role, _, state = row.model.partition(":")
    with borrowing(config.folder, [Path(folder) for folder in lenders], stages):
        if table.has_curves:
            distill.main(config)
        elif row.phase is not None:
            (distill if row.phase == "student" else align).main(config)
        elif role == "student" and state != "before":
            run.main(config)
        elif role == "proxy" and state != "raw":
            align.main(config)
        asks = row.phase is None and not table.has_curves
        answered = next(iter(run_benchmarks(config)["models"])) if asks else row.model
    return {
        "model": answered,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
    }


def _is_made(record: Path, made_from: str) -> bool:
    return record.is_file() and read_json(record)["made_from"] == made_from


def _runs_below(runs: Path) -> list[str]:
    """Folders that may hold a run: those in ``runs``, and those one level deeper, as of a table."""
    return [str(path) for path in sorted((*runs.glob("*"), *runs.glob("*/*"))) if path.is_dir()]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = base_parser(
        "tables",
        SUMMARY,
        names=("--table", "--config"),
        what="YAML file of the table or figure (docs/tables.md)",
    )
    add = found.add_argument
    add("--only", action="append", default=[], metavar="ROW[,ROW]", help="rows (default: all)")
    add("--runs", metavar="DIR", help="folder of the runs, instead of the one that the file names")
    what = found.add_mutually_exclusive_group()
    what.add_argument("--dry-run", action="store_true", help="check each row's run; train nothing")
    what.add_argument("--report-only", action="store_true", help="write the table; run nothing")
    what.add_argument(
        "--list", action="store_true", help="print the rows, each with the row that it waits for"
    )
    return found


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    arguments = parser().parse_args(argv)
    only = [name for names in arguments.only for name in names.split(",") if name]

    def work() -> int:
        table = load_table(arguments.config, runs=arguments.runs)
        if arguments.list:
            for row in table.chosen(only):
                print(*(name for name in (row.name, row.after) if name))
        elif arguments.dry_run:
            check(table, only, arguments.set)
        elif arguments.report_only:
            from proxykd_jax.reporting.paper_table import write_table

            print(on_first(lambda: str(write_table(table))))
        else:
            print(main(table, only, arguments.set))
        return 0

    return run_work(work)


def check(table: TableFile, only: Sequence[str] = (), overrides: Sequence[str] = ()) -> None:
    """Checks the run of each row, as ``--dry-run`` does.

    Args:
      table, only, overrides: as in ``main``.

    Raises:
      UserError: at least one row has a problem; one message names all of them with their rows.
    """
    from proxykd_jax.checking import dry_run

    problems = []
    for row, config in [(row, table.run_of(row, overrides)) for row in table.chosen(only)]:
        print(f"\n{row.name}: {row.method}, {row.student}, {row.teacher}", flush=True)
        try:
            dry_run(config)
        except UserError as error:
            problems.append(f"row {row.name}: {error}")
    if problems:
        raise UserError("\n".join(problems))


if __name__ == "__main__":
    sys.exit(command())
