"""Writes a first config that fits your data, your models and this machine.

Run it as ``proxykd init --answers answers.jsonl --proxy FOLDER --student FOLDER``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from proxykd_jax.cli import program, run_work
from proxykd_jax.errors import UserError

SUMMARY = "Look at data and models, and write a short config that fits them and this machine."


def command(argv: Sequence[str] | None = None) -> int:
    """Writes the config; returns the exit code."""
    arguments = _parser().parse_args(argv)
    return run_work(lambda: _write(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("init"), description=SUMMARY, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--answers",
        nargs="+",
        required=True,
        metavar="FILE",
        help="the teacher's answers: files, folders or globs, in any format of docs/formats.md",
    )
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="KEY=COLUMN",
        help="the files' own names of columns, such as prompt=question response=answer",
    )
    add("--proxy", required=True, metavar="MODEL", help="folder or hub name of the larger model")
    add(
        "--student",
        metavar="MODEL",
        help="folder or hub name of the small model (default: the proxy, with --first-layers)",
    )
    add(
        "--first-layers",
        type=int,
        metavar="N",
        help="make the student of the first N layers of --student",
    )
    add(
        "--test",
        nargs="+",
        default=[],
        metavar="FILE",
        help="a test set with the teacher's answers",
    )
    add(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="prompts that the teacher has not answered; the aligned proxy answers them",
    )
    add("--name", default="my_run", help="name of the run (default: my_run)")
    add("--out", default="run.yaml", metavar="FILE", help="where to write (default: run.yaml)")
    add("--force", action="store_true", help="write over an existing file")
    return parser


def _write(arguments: argparse.Namespace) -> int:
    from proxykd_jax.artifacts import write_bytes
    from proxykd_jax.checking.first_config import Given, first_config

    out = Path(arguments.out)
    if out.exists() and not arguments.force:
        raise UserError(
            f"{out} exists. Name another file with --out, or overwrite it with --force."
        )
    if arguments.student is None and arguments.first_layers is None:
        raise UserError(
            "Name the student with --student, or cut it out of the proxy with --first-layers."
        )
    text = first_config(
        Given(
            tuple(arguments.answers),
            _columns(arguments.columns),
            arguments.proxy,
            arguments.student or arguments.proxy,
            arguments.first_layers,
            tuple(arguments.test),
            tuple(arguments.prompts),
            arguments.name,
        )
    )
    write_bytes(out, text.encode())
    print(text, end="")
    print(f"init: wrote {out}; next: proxykd check --config {out}", flush=True)
    return 0


def _columns(given: Sequence[str]) -> dict[str, str]:
    for word in given:
        if "=" not in word:
            raise UserError(f"--columns takes KEY=COLUMN, such as prompt=question, not {word}.")
    return dict(word.split("=", 1) for word in given)


if __name__ == "__main__":
    sys.exit(command())
