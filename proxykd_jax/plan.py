"""Tells whether a run fits on devices that are not present, and how long it takes.

Run it as ``python -m proxykd_jax.plan --config FILE --device a100-80gb --count 8``, or with
``--table FILE`` for the runs of all rows of a table of the paper. It compiles every stage from
abstract shapes, so it needs neither weights nor data.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.cli import USER_ERROR, base_parser
from proxykd_jax.config import Config, load_config
from proxykd_jax.config.table_file import load_table
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.devices import DEVICES

if TYPE_CHECKING:
    from proxykd_jax.planning import Request

_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "proxykd_jax" / "plan"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = base_parser(
        "plan",
        "Compile every stage of a run for devices that are not present; print memory and time.",
        required=False,
    )
    add = found.add_argument
    add("--table", metavar="FILE", help="plan the runs of a table's rows instead (docs/tables.md)")
    add("--only", action="append", default=[], metavar="ROW[,ROW]", help="rows of the table")
    add("--device", required=True, choices=sorted(DEVICES), help="device to compile for")
    add("--count", type=int, required=True, metavar="N", help="number of devices")
    add("--stage", action="append", metavar="NAME", help="only this stage (may be repeated)")
    add("--json", metavar="FILE", help="write the figures of each stage to FILE")
    add(
        "--fit", metavar="FILE",
        help="search meshes and batches; write a config with the fastest that fit to FILE",
    )  # fmt: skip
    half = "(default: half of corpus.max_length)"
    add("--prompt-tokens", type=int, metavar="N", help=f"tokens of a mean prompt {half}")
    add("--answer-tokens", type=int, metavar="N", help=f"tokens of a mean answer {half}")
    add(
        "--samples", type=int, default=40_000, metavar="N",
        help="samples that the hours are for (default 40000, as in the paper)",
    )  # fmt: skip
    add(
        "--utilisation", type=float, default=0.4, metavar="U",
        help="assumed share of the device's peak, for the hours (default 0.4)",
    )  # fmt: skip
    add("--no-cache", action="store_true", help="compile again what is in the cache")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the plan and writes the requested files.

    Args:
      argv: arguments (default: the process's).

    Returns:
      The exit code: 0, or 2 after a user error.
    """
    arguments = parser().parse_args(argv)
    try:
        requests = _requests(arguments)
        request = next(iter(requests.values()))
        from proxykd_jax.parallel.ahead import prepare_process

        prepare_process(request.count)
        from proxykd_jax.planning import StagePlan, fit, plan, render, render_rows

        def figures(stages: list[StagePlan]) -> dict[str, Any]:
            return {stage.name: stage.figures() for stage in stages}

        written: dict[str, Any]
        if arguments.table:
            rows = {}
            for name, asked in requests.items():
                print(f"row {name}", flush=True)
                rows[name] = plan(asked, searches=False)
            print(render_rows(arguments.table, request, rows), flush=True)
            written = {name: figures(stages) for name, stages in rows.items()}
        else:
            stages = plan(request)
            print(render(request, stages), flush=True)
            written = figures(stages)
        if arguments.json:
            write_bytes(Path(arguments.json), (json.dumps(written, indent=2) + "\n").encode())
        if arguments.fit:
            write_bytes(Path(arguments.fit), fit(request, stages).encode())
            print(f"wrote {arguments.fit}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _requests(arguments: argparse.Namespace) -> dict[str, Request]:
    """The requests by the name of a table's row, or the only one."""
    if (arguments.config is None) == (arguments.table is None):
        raise UserError("Give --config FILE for a run, or --table FILE for all rows of a table.")
    if arguments.table is None:
        if arguments.only:
            raise UserError("--only names rows of --table.")
        return {"": _request(arguments, load_config(arguments.config, arguments.set))}
    if arguments.fit:
        raise UserError("--fit writes one run's config; give it with --config.")
    table = load_table(arguments.table)
    only = [name for names in arguments.only for name in names.split(",") if name]
    # Collected outputs need no program.
    rows = [row for row in table.chosen(only) if not row.model.endswith(".jsonl")]
    if not rows:
        raise UserError("--only: these rows run no program.")
    return {row.name: _request(arguments, table.run_of(row, arguments.set)) for row in rows}


def _request(arguments: argparse.Namespace, config: Config) -> Request:
    from proxykd_jax.planning import Request

    if arguments.count < 1 or arguments.samples < 1:
        raise UserError("--count and --samples must be at least 1.")
    if not 0 < arguments.utilisation <= 1:
        raise UserError(f"--utilisation is a share in (0, 1], not {arguments.utilisation}.")
    half = config.corpus.max_length // 2
    return Request(
        config,
        DEVICES[arguments.device],
        arguments.count,
        stages=tuple(arguments.stage or ()),
        prompt=arguments.prompt_tokens or half,
        answer=arguments.answer_tokens or half,
        samples=arguments.samples,
        utilisation=arguments.utilisation,
        cache=None if arguments.no_cache else _CACHE.expanduser(),
    )


if __name__ == "__main__":
    sys.exit(main())
