"""Writes one HTML file that shows a run, or compares several; it opens from disk.

    proxykd report --run runs/my_run
    proxykd report --run runs/one runs/other --out compared.html

It reads what the stages have stored and loads no model. The page says what a run lacks.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from proxykd_jax.artifacts import write_bytes
from proxykd_jax.cli import base_parser, run_alone
from proxykd_jax.config import ConfigLike, as_config, load_config
from proxykd_jax.errors import UserError

SUMMARY = "Show a run, or several compared, on one HTML page."
FILE = "report.html"


def main(config: ConfigLike) -> Path:
    """Writes ``<run>/report.html``; leaves the file untouched if its content is the same.

    Args:
      config: the run, see ``as_config``.

    Returns:
      The path of the file.

    Raises:
      UserError: there is no such run, or the file cannot be written.
    """
    from proxykd_jax.peers import on_first

    config = as_config(config)
    folder, price = config.folder, config.logging.price_per_hour
    return Path(on_first(lambda: str(write_report([folder], folder / FILE, price=price))))


def write_report(runs: Sequence[Path], out: Path, *, price: float | None = None) -> Path:
    """Writes the page of one run, or a page that compares several.

    Args:
      runs: folders of runs.
      out: the HTML file.
      price: ``logging.price_per_hour`` (default: that of each run's own config).

    Returns:
      ``out``.

    Raises:
      UserError: a folder holds no run, one is named twice, or the file cannot be written.
    """
    from proxykd_jax.reporting.page import render
    from proxykd_jax.reporting.run_folder import read_runs

    if out.is_dir():
        raise UserError(f"{out} is a folder; --out names a file, {out / FILE} for example.")
    found = read_runs(runs)
    if price is not None:
        found = [dataclasses.replace(run, price_per_hour=price) for run in found]
    page = render(found).encode()
    try:
        if not (out.is_file() and out.read_bytes() == page):
            write_bytes(out, page)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    return out


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    found = base_parser("report", SUMMARY, required=False)
    found.add_argument(
        "--run", nargs="+", type=Path, metavar="DIR", help="folders of runs, instead of --config"
    )
    found.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the page (default for one run: DIR/{FILE})"
    )
    return found


def command(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    given = parser()
    arguments = given.parse_args(argv)
    if (arguments.run is None) == (arguments.config is None):
        given.error("give either --run or --config")
    if arguments.set and arguments.config is None:
        given.error("--set goes with --config")
    # This command computes little, so it leaves GPUs to other processes.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

    def work() -> int:
        price = None
        runs = arguments.run
        if runs is None:
            config = load_config(arguments.config, arguments.set)
            runs, price = [config.folder], config.logging.price_per_hour
        if arguments.out is None and len(runs) > 1:
            raise UserError("several runs are compared on one page; name the page with --out FILE.")
        print(write_report(runs, arguments.out or runs[0] / FILE, price=price))
        return 0

    return run_alone(work)


if __name__ == "__main__":
    sys.exit(command())
