"""Distils and measures the students that stand beside the headline, all in one process.

    python -m benchmarks.miniature.students --out runs/demo

It calls what ``python -m proxykd_jax.distill`` and ``python -m proxykd_jax.evaluate`` call, once
for each recipe, so that the libraries are imported once.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks.command import exit_code
from benchmarks.miniature.recipes import HEADLINE, STUDENTS
from proxykd_jax import distill, evaluate
from proxykd_jax.config import load_config


def run_students(out: Path, names: Iterable[str]) -> None:
    """Distils and evaluates the named recipes of ``out/configs``."""
    for name in names:
        config = load_config(out / "configs" / f"{name}.yaml")
        distill.main(config)
        evaluate.main(config)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    others = [name for name in STUDENTS if name != HEADLINE]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.miniature.students",
        description="Distil and measure the students that the headline is compared with.",
    )
    parser.add_argument("--out", type=Path, required=True, help="the miniature's folder")
    parser.add_argument("names", nargs="*", default=others, help=f"some of {', '.join(others)}")
    arguments = parser.parse_args(argv)
    return exit_code(lambda: run_students(arguments.out, arguments.names))


if __name__ == "__main__":
    raise SystemExit(main())
