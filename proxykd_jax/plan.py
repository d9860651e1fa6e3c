"""Tells whether a run fits on devices that are not present, and how long it takes.

Run it as ``proxykd plan --config FILE --device a100-80gb --count 8``, or with ``--table FILE`` for
the runs of all rows of a table of the paper. It compiles every stage from abstract shapes, so it
needs neither weights nor data.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.cli import CommandParser, base_parser, run_alone
from proxykd_jax.config import Config, ConfigLike, as_config, load_config
from proxykd_jax.config.table_file import TableFile, load_table
from proxykd_jax.errors import UserError
from proxykd_jax.parallel.devices import DEVICES

if TYPE_CHECKING:
    from proxykd_jax.planning import Request, StagePlan

SUMMARY = "Compile every stage of a run for devices that are not present; print memory and time."
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "proxykd_jax" / "plan"


def main(
    config: ConfigLike,
    device: str,
    count: int,
    *,
    fit_to: str | Path | None = None,
    **options: Any,
) -> list[StagePlan]:
    """Prints the plan of a run, and writes a config that fits if asked to.

    It must run before jax is imported, because it gives jax the devices to compile for.

    Args:
      config: the run, see ``as_config``.
      device: name of the device, one of ``DEVICES``.
      count: number of devices.
      fit_to: file for a config with the fastest meshes and batches that fit.
      **options: ``stages`` (names of the stages to plan; default: all); ``prompt_tokens`` and
        ``answer_tokens`` (of a mean row; default: half of ``corpus.max_length`` each); ``samples``
        (rows that the hours are for; default: 40,000); ``utilisation`` (assumed share of the
        device's peak for the hours, in (0, 1]; default: 0.4); ``use_cache`` (whether results of
        earlier compilations are used; default: True).

    Returns:
      One plan per stage, in the order of the run.

    Raises:
      UserError: an argument is out of range, jax was imported before, a model's config.json is
        missing, or a mesh does not fit the models or the devices.
    """
    (request,) = _requests([as_config(config)], device, count, **options)
    from proxykd_jax.planning import fit, plan, render

    found = plan(request)
    print(render(request, found), flush=True)
    if fit_to:
        write_bytes(Path(fit_to), fit(request, found).encode())
        print(f"wrote {fit_to}")
    return found


def plan_rows(
    table: TableFile | str | Path,
    device: str,
    count: int,
    *,
    only: Sequence[str] = (),
    overrides: Sequence[str] = (),
    **options: Any,
) -> dict[str, list[StagePlan]]:
    """Prints the plans of a table's rows.

    Args:
      table: a table of the paper (docs/tables.md).
      device, count, options: as in ``main``.
      only: names of rows (default: all).
      overrides: changes of single keys of every row, as ``--set`` takes them.

    Returns:
      The plans by the name of the row.

    Raises:
      UserError: as in ``main``, or these rows run no program.
    """
    table = table if isinstance(table, TableFile) else load_table(table)
    # Collected outputs need no program.
    rows = [row for row in table.chosen(only) if not row.model.endswith(".jsonl")]
    if not rows:
        raise UserError("--only: these rows run no program.")
    runs = [table.run_of(row, overrides) for row in rows]
    requests = _requests(runs, device, count, **options)
    from proxykd_jax.planning import plan, render_rows

    found = {}
    for row, request in zip(rows, requests, strict=True):
        print(f"row {row.name}", flush=True)
        found[row.name] = plan(request, searches=False)
    print(render_rows(table.name, requests[0], found), flush=True)
    return found


def _requests(
    configs: Sequence[Config],
    device: str,
    count: int,
    *,
    stages: Sequence[str] = (),
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    samples: int = 40_000,
    utilisation: float = 0.4,
    use_cache: bool = True,
) -> list[Request]:
    """What is asked for; gives jax the devices to compile for. See ``main``."""
    if device not in DEVICES:
        raise UserError(f"{device} is no device that plan knows: {', '.join(sorted(DEVICES))}.")
    if count < 1 or samples < 1:
        raise UserError("--count and --samples must be at least 1.")
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation is a share in (0, 1], not {utilisation}.")
    from proxykd_jax.parallel.ahead import prepare_process

    prepare_process(count)
    from proxykd_jax.planning import Request

    return [
        Request(
            config,
            DEVICES[device],
            count,
            stages=tuple(stages),
            prompt=prompt_tokens or config.corpus.max_length // 2,
            answer=answer_tokens or config.corpus.max_length // 2,
            samples=samples,
            utilisation=utilisation,
            cache=_CACHE.expanduser() if use_cache else None,
        )
        for config in configs
    ]


def parser() -> CommandParser:
    """The command's arguments."""
    found = base_parser("plan", SUMMARY, required=False)
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


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, see ``cli.run_command``."""
    arguments = parser().parse_args(argv)
    options: dict[str, Any] = {
        "stages": arguments.stage or (),
        "prompt_tokens": arguments.prompt_tokens,
        "answer_tokens": arguments.answer_tokens,
        "samples": arguments.samples,
        "utilisation": arguments.utilisation,
        "use_cache": not arguments.no_cache,
    }

    def work() -> int:
        written: dict[str, Any]
        if (arguments.config is None) == (arguments.table is None):
            raise UserError(
                "Give --config FILE for a run, or --table FILE for all rows of a table."
            )
        if arguments.table is None:
            if arguments.only:
                raise UserError("--only names rows of --table.")
            config = load_config(arguments.config, arguments.set)
            stages = main(
                config, arguments.device, arguments.count, fit_to=arguments.fit, **options
            )
            written = _figures(stages)
        else:
            if arguments.fit:
                raise UserError("--fit writes one run's config; give it with --config.")
            only = [name for names in arguments.only for name in names.split(",") if name]
            rows = plan_rows(
                arguments.table,
                arguments.device,
                arguments.count,
                only=only,
                overrides=arguments.set,
                **options,
            )
            written = {name: _figures(stages) for name, stages in rows.items()}
        if arguments.json:
            write_bytes(Path(arguments.json), (json.dumps(written, indent=2) + "\n").encode())
        return 0

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # otherwise XLA reports how it saved memory
    return run_alone(work)


def _figures(stages: list[StagePlan]) -> dict[str, Any]:
    return {stage.name: stage.figures() for stage in stages}


if __name__ == "__main__":
    sys.exit(command())
